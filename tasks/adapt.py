"""A warm start for an archive: a sample of its faces, the cleaner ones, fine-tuning, a prior's folder."""

import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict, Field

from rgcp_core.errors import UnitError
from rgcp_core.images import find_photos
from rgcp_core.personal_album import FoundFace
from rgcp_core.prior import Card, find_prior, read_card
from rgcp_core.settings import ConstrainSettings, FaceSettings
from rgcp_core.warm_start import CleanFaces, WarmStart, warm_start
from tasks.device import loaded_prior, pick_device
from tasks.events import check_stop, tell
from tasks.job import Framing
from tasks.personal import faces_of


class AdaptRequest(BaseModel):
    """What ``rgcp prior adapt`` and the flow are asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    paths: tuple[Path, ...] = Field(description="Folders and files with photos.")
    name: str = Field(description="Name of the new prior.")
    folder: Path = Field(description="Folder that it is written to.")
    prior: str = Field(description="Name or folder of the prior to start from.")
    framing: Framing = Field(default="photos", description="See `tasks.job.Job`.")
    faces: FaceSettings = Field(description="Which faces are looked at.")
    look_at: int = Field(ge=1, description="Photos to look at, drawn from all of them.")
    most: int = Field(ge=1, description="Faces to learn from at most.")
    least_detail: float = Field(description="See `rgcp_core.warm_start.choose_clean`.")
    tuning: ConstrainSettings = Field(description="Of the fine-tuning.")
    seed: int = Field(default=0, description="Seed of all random streams.")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")


@task(cache_policy=NO_CACHE)
def look_at_faces(request: AdaptRequest) -> list[FoundFace]:
    """Aligned faces of a random sample of the photos; a photo that cannot be read is passed over."""
    card = read_card(find_prior(request.prior))
    names = sorted({Path(root, name) for root, name in find_photos(request.paths)})
    if len(names) > request.look_at:
        names = sorted(random.Random(request.seed).sample(names, request.look_at))
    found: list[FoundFace] = []
    for number, path in enumerate(names, start=1):
        check_stop()
        with suppress(UnitError):  # the run over the archive will say what is wrong with it
            found += faces_of(path, path.name, request.framing, request.faces, card, identity=None)[0]
        tell(request.name, "faces", number / len(names))
    return found


@task(cache_policy=NO_CACHE)
def fine_tune_on_archive(request: AdaptRequest, clean: CleanFaces) -> WarmStart:
    """The warm prior."""
    return warm_start(
        loaded_prior(request.prior, pick_device(request.device)),
        clean.crops,
        request.tuning,
        seed=request.seed,
        unit=request.name,
        on_step=lambda done, steps: tell(request.name, "fine-tuning", done / steps),
    )


@task(cache_policy=NO_CACHE)
def keep_prior(request: AdaptRequest, clean: CleanFaces, warm: WarmStart) -> Card:
    """Write the warm prior into its folder; its card says what it was made from."""
    old = warm.prior.card
    facts = {
        "prior": old.name,
        "prior_sha256": old.sha256,
        "photos": [path.name for path in request.paths],
        "faces_found": clean.found,
        "faces_used": len(clean.crops),
        "left_out": clean.left_out,
        "settings": request.tuning.model_dump(),
        "seed": request.seed,
        "heldout_loss_before": warm.loss_before,
        "heldout_loss_after": warm.loss_after,
    }
    card = old.model_copy(
        update={
            "name": request.name,
            "source": f"{old.name} ({old.source}), fine-tuned on {len(clean.crops)} faces of the user's own photos",
            "training": {**old.training, "warm_start": facts},
            "heldout_eps_mse": {},  # those were the other prior's
        }
    )
    return replace(warm.prior, card=card).save(request.folder).card
