"""A personal prior: faces of a folder, the person's album, fine-tuning, measurement, the person's folder."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict, Field

from rgcp_core.compute import computing
from rgcp_core.constrain import Constrained, constrain_prior
from rgcp_core.errors import UnitError
from rgcp_core.faces.align import align_face, crop_face
from rgcp_core.faces.detect import gate_faces, load_detector
from rgcp_core.framing import centre_box, frame_box
from rgcp_core.images import find_photos, load_photo
from rgcp_core.leave_out import leave_out
from rgcp_core.metrics.identity import IdentityModel, load_identity
from rgcp_core.people import NO_IDENTITY, AlbumFace, Person, PersonCard, save_person
from rgcp_core.personal_album import AlbumChoice, FoundFace, grey, sharpness, yaw_of
from rgcp_core.prior import Card, find_prior, read_card
from rgcp_core.randomness import stream
from rgcp_core.sampling import sample
from rgcp_core.settings import ConstrainSettings, FaceSettings, Settings
from rgcp_core.training import image_grid
from tasks.align import whole_picture
from tasks.device import loaded_prior, pick_device
from tasks.events import check_stop, tell
from tasks.job import Framing
from tasks.recognise import IDENTITY

SAMPLES = 9
SAMPLING_STEPS = {"fast": 50, "balanced": 100, "paper": 250}
"""Denoising steps of the unconditional samples: a look at the prior, not a measurement."""


class PersonalRequest(BaseModel):
    """What ``rgcp personalize`` and the flow are asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    album_dir: Path = Field(description="Folder of photos of the person.")
    name: str = Field(description="Name of the person.")
    people: Path = Field(description="Folder of people.")
    prior: str = Field(description="Name or folder of the prior.")
    settings: Settings = Field(description="Of the restorations that it is compared with, at the prior's size.")
    personal: ConstrainSettings = Field(description="Of the fine-tuning.")
    framing: Framing = Field(
        default="photos", description="photos finds faces; window and ffhq take aligned crops; centre needs no faces."
    )
    left_out: int = Field(default=0, ge=0, description="Photos to leave out for the measurement; 0 measures nothing.")
    generative: bool = Field(default=True, description="Whether that compares with the generative album too.")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    code_version: str = Field(description="For the card.")


@task(cache_policy=NO_CACHE)
def find_faces(request: PersonalRequest) -> tuple[list[FoundFace], list[AlbumFace]]:
    """All aligned faces of the folder with their embeddings, and what could not be used, with the reason."""
    card = read_card(find_prior(request.prior))
    identity = load_identity(IDENTITY) if request.framing != "centre" else None
    found: list[FoundFace] = []
    unusable: list[AlbumFace] = []
    names = [(root, name) for root, name in find_photos([request.album_dir])]
    for number, (root, name) in enumerate(names, start=1):
        check_stop()
        place = str(Path(root, name).relative_to(request.album_dir)) if request.album_dir.is_dir() else name
        try:
            faces, left = faces_of(Path(root, name), place, request.framing, request.settings.faces, card, identity)
        except UnitError as error:
            unusable.append(AlbumFace(photo=place, left_out=str(error)))
        else:
            found += faces
            unusable += left
        tell(request.name, "faces", number / len(names))
    return found, unusable


def faces_of(
    path: Path, place: str, framing: Framing, settings: FaceSettings, card: Card, identity: IdentityModel | None
) -> tuple[list[FoundFace], list[AlbumFace]]:
    """The aligned faces of a photo, which is called ``place``, and what of it cannot be used, with the reason.

    Without an identity network all embeddings are alike. Raises `UnitError` when the photo cannot be used at all.
    """
    photo = load_photo(path)
    facts = AlbumFace(photo=place, sha256=photo.sha256)
    if framing != "photos":
        width, height = photo.size
        if framing == "centre":
            alignment = frame_box(centre_box(photo.size), photo.size, card.image_size)
        elif width == height:
            alignment = whole_picture(width, card, framing)
        else:
            raise UnitError("not_square", f"An aligned crop must be square; this one is {width} x {height}.")
        whole = facts.model_copy(update={"face_index": 0, "pixels": alignment.scale * card.image_size})
        return [_face(whole, crop_face(photo.rgb, alignment), card, identity)], []
    gated = gate_faces(
        load_detector(settings.detector)(photo.rgb),
        photo.size,
        crop_window=card.crop_window,
        min_score=settings.min_score,
        min_size=settings.min_size,
        prior_size=card.image_size,
        max_scale=None,  # a photo may be finer than the prior: the album is reduced to its size
    )
    if not gated:
        return [], [facts.model_copy(update={"left_out": "no face was found"})]
    found, left_out = [], []
    for index, (face, reason) in enumerate(gated):
        here = facts.model_copy(update={"face_index": index, "score": face.score})
        if reason is not None:
            left_out.append(here.model_copy(update={"left_out": reason.replace("_", " ")}))
            continue
        alignment = align_face(face.landmarks, card.image_size, card.crop_window)
        more = {"pixels": alignment.scale * card.image_size, "yaw": yaw_of(face.landmarks)}
        found.append(_face(here.model_copy(update=more), crop_face(photo.rgb, alignment), card, identity))
    return found, left_out


def _face(facts: AlbumFace, crop: torch.Tensor, card: Card, identity: IdentityModel | None) -> FoundFace:
    looks = {"sharpness": sharpness(crop), "brightness": float(grey(crop).mean())}
    # what is no face cannot be recognised: all pictures of the folder count as alike
    embedding = torch.ones(1) if identity is None else identity.embed(crop[None], card.crop_window)[0]
    return FoundFace(facts.model_copy(update=looks), crop, embedding)


@task(cache_policy=NO_CACHE)
def fine_tune_on_person(request: PersonalRequest, choice: AlbumChoice) -> Constrained:
    """The personal prior."""
    prior = loaded_prior(request.prior, pick_device(request.device))
    values = request.personal
    return constrain_prior(
        prior,
        torch.stack([face.crop for face in choice.album]),
        **values.arguments(),
        precision=request.settings.precision,
        compiled=request.settings.compiled,
        seed=request.settings.seed,
        unit=request.name,
        on_step=lambda done, steps: tell(request.name, "fine-tuning", done / steps),
    )


@task(cache_policy=NO_CACHE)
def measure_left_out(request: PersonalRequest, choice: AlbumChoice) -> dict[str, Any] | None:
    """Identity of photos that the fine-tuning had not seen; see `rgcp_core.leave_out.leave_out`."""
    if request.left_out == 0:
        return None
    return leave_out(
        loaded_prior(request.prior, pick_device(request.device)),
        torch.stack([face.crop for face in choice.album]),
        load_identity(IDENTITY),
        settings=request.settings,
        personal=request.personal,
        count=request.left_out,
        name=request.name,
        generative=request.generative,
        on_progress=lambda stage, share: tell(request.name, stage, share),
    )


@task(cache_policy=NO_CACHE)
def keep_person(
    request: PersonalRequest,
    choice: AlbumChoice,
    unusable: list[AlbumFace],
    constrained: Constrained,
    measured: dict[str, Any] | None,
) -> Person:
    """Draw samples of the personal prior and write the person's folder."""
    prior = loaded_prior(request.prior, pick_device(request.device))
    personal, size = constrained.prior, prior.card.image_size
    settings = request.settings
    with computing(personal.network, settings.precision, settings.compiled) as model:
        samples = sample(
            model,
            (3, size, size),
            prior.schedule,
            generators=[stream(settings.seed, request.name, f"sample:{i}") for i in range(SAMPLES)],
            device=next(prior.network.parameters()).device,
            steps=SAMPLING_STEPS.get(settings.preset),
            on_step=lambda done, steps: tell(request.name, "samples", done / steps),
        )
    card = PersonCard(
        name=request.name,
        prior=prior.card.name,
        prior_sha256=prior.card.sha256,
        image_size=size,
        crop_window=prior.card.crop_window,
        preset=settings.preset,
        settings=request.personal.model_dump(),
        seed=settings.seed,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        code_version=request.code_version,
        faces=(*(face.facts for face in choice.album), *choice.left_out, *unusable),
        variety=choice.variety,
        warnings=choice.warnings,
        identity_network=NO_IDENTITY if request.framing == "centre" else load_identity(IDENTITY).name,
        loss_start=constrained.loss_start,
        loss_end=constrained.loss_end,
        leave_out=measured,
    )
    return save_person(
        request.people,
        card,
        personal=personal,
        prior=prior,
        album=torch.stack([face.crop for face in choice.album]),
        embeddings=torch.stack([face.embedding for face in choice.album]),
        samples=image_grid(samples),
    )
