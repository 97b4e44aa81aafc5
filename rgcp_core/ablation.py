"""Studies of the method: the same damaged faces restored under conditions that differ in one thing at a time.

A condition says which anchors the prior is constrained on and with which settings; a case is one damaged face whose
clean picture is known. `restore_conditions` restores a case under many conditions and computes what they share, an
album or a constrained prior, once.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rgcp_core.compute import computing
from rgcp_core.constrain import Constrained, constrain_prior, draft_of
from rgcp_core.errors import UserError
from rgcp_core.prior import Prior
from rgcp_core.randomness import stream
from rgcp_core.sampling import generate_album, restore, sample
from rgcp_core.settings import Settings

Anchors = Literal["own", "other", "personal", "stranger"]


class Condition(BaseModel):
    """One way of restoring a face."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Label in tables and plots.")
    level: float | None = Field(default=None, description="Place on the study's axis, e.g. the noise step.")
    series: str = Field(default="", description="Which curve of the plot it belongs to.")
    anchors: Anchors = Field(
        default="own",
        description="own: an album drawn from the face itself. other: the album of another case (negative control). "
        "personal: photos of the person. stranger: photos of somebody else (negative control).",
    )
    anchor_count: int | None = Field(default=None, ge=1, description="Use only the first so many photos.")
    settings: Settings = Field(description="Settings at the prior's size; their seed is not used.")
    unconditional: bool = Field(
        default=False, description="Draw a sample from pure noise, in restore.steps steps: what does the prior know?"
    )
    t_end: int | None = Field(
        ge=1, description="Train at times below this; none trains at all T. Where K is picked, the settings say."
    )


@dataclass(frozen=True)
class Case:
    """A damaged face whose clean picture is known. All pictures are (3,H,W) or (N,3,H,W) in [-1,1]."""

    face: str
    """Its name; with the seed it decides every draw."""
    y: Tensor
    clean: Tensor
    kind: str = ""
    """What its damage is called."""
    other: "Case | None" = None
    """Another face, for the control with somebody else's album."""
    personal: Tensor | None = None
    """Other photos of the person."""
    stranger: Tensor | None = None
    """Photos of somebody else."""


@dataclass(frozen=True)
class Restored:
    """A case restored under one condition."""

    condition: Condition
    picture: Tensor
    """(3,H,W) in [-1,1]."""
    anchors: Tensor | None
    """(N,3,H,W) what the prior was constrained on; None when it was not constrained."""
    noise_step: int
    """K: the one stated, or the one picked for ``auto``."""
    loss_start: float | None
    loss_end: float | None


def restore_conditions(
    prior: Prior,
    case: Case,
    conditions: Sequence[Condition],
    seed: int,
    on_condition: Callable[[int, int], None] | None = None,
) -> Iterator[Restored]:
    """Restore ``case`` under each of ``conditions``, in their order.

    Random streams depend on (seed, face) alone, so that two conditions see the same noise and differ only in what they
    are meant to differ in.

    Raises:
        UserError: anchors that the case does not have.
    """
    device = next(prior.network.parameters()).device
    albums: dict[str, Tensor] = {}
    constrained: dict[str, Constrained] = {}
    for i, condition in enumerate(conditions):
        settings = condition.settings
        chosen: Constrained | None = None
        anchors: Tensor | None = None
        if settings.constrain.iterations > 0:
            drawn = settings.album.model_dump_json() + "".join(settings.arithmetic())
            album_name = digest(condition.anchors, str(condition.anchor_count), drawn)
            if album_name not in albums:
                albums[album_name] = _anchors(prior, case, condition, seed).cpu()
            anchors = albums[album_name]
        noise_step = prior.noise_step_for(settings.restore.noise_step, case.y)
        picked = settings.restore.noise_step == "auto"
        t_end = settings.constrain.t_end(noise_step) if picked else condition.t_end
        if anchors is not None:
            watched = "" if settings.constrain.settled is None else str(noise_step)
            name = digest(album_name, settings.constrain.model_dump_json(), str(t_end), watched)
            if name not in constrained:
                constrained[name] = constrain_prior(
                    prior,
                    anchors,
                    **settings.constrain.arguments(),
                    precision=settings.precision,
                    compiled=settings.compiled,
                    t_end=t_end,
                    seed=seed,
                    unit=case.face,
                    draft=draft_of(case.y.to(device), prior.schedule, noise_step, seed, case.face),
                )
            chosen = constrained[name]
        network = prior.network if chosen is None else chosen.prior.network
        steps = settings.restore.steps
        with computing(network, settings.precision, settings.compiled) as model:
            if condition.unconditional:
                streams, size = [stream(seed, case.face, "sample")], prior.card.image_size
                shape = (3, size, size)
                picture = sample(model, shape, prior.schedule, generators=streams, device=device, steps=steps)
            else:
                y, streams = case.y[None].to(device), [stream(seed, case.face, "restore")]
                picture = restore(model, y, prior.schedule, noise_step=noise_step, steps=steps, generators=streams)
        yield Restored(
            condition,
            picture[0].cpu(),
            anchors,
            noise_step,
            chosen.loss_start if chosen else None,
            chosen.loss_end if chosen else None,
        )
        if on_condition is not None:
            on_condition(i + 1, len(conditions))


def _anchors(prior: Prior, case: Case, condition: Condition, seed: int) -> Tensor:
    """Pictures that a condition constrains the prior on."""
    photos = {"personal": case.personal, "stranger": case.stranger}.get(condition.anchors)
    if condition.anchors in ("personal", "stranger"):
        if photos is None:
            raise UserError(f"{case.face}: the condition {condition.name} needs {condition.anchors} photos.")
        return photos[: condition.anchor_count]
    source = case if condition.anchors == "own" else case.other
    if source is None:
        raise UserError(f"{case.face}: the condition {condition.name} needs another face; the set has only one.")
    settings = condition.settings
    with computing(prior.network, settings.precision, settings.compiled) as model:
        return generate_album(
            model,
            source.y.to(next(prior.network.parameters()).device),
            prior.schedule,
            **settings.album.arguments(),
            generators=[stream(seed, source.face, f"album:{i}") for i in range(settings.album.size)],
        )


def cell_key(prior: Prior, case: Case, condition: Condition, seed: int) -> str:
    """Hash of all that decides a restored picture: it names the cell's files, so that a study resumes."""
    settings = {
        name: value
        for name, value in condition.settings.deciding().items()
        if name in ("album", "constrain", "restore", "precision", "compiled")
    }
    pictures: list[Tensor | None] = [case.y]
    if condition.settings.constrain.iterations > 0:
        other = case.other.y if condition.anchors == "other" and case.other else None
        photos = {"personal": case.personal, "stranger": case.stranger}.get(condition.anchors)
        pictures += [other, None if photos is None else photos[: condition.anchor_count]]
    content = "".join("-" if p is None else digest(p.contiguous().numpy().tobytes()) for p in pictures)
    other_name = case.other.face if condition.anchors == "other" and case.other else ""
    if condition.unconditional:
        content += "unconditional"
    return digest(
        prior.card.sha256 or "",
        case.face,
        other_name,
        content,
        condition.anchors,
        str(sorted(settings.items())),
        str(condition.t_end),
        str(seed),
    )


def digest(*parts: str | bytes) -> str:
    """Short sha256 over the parts."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode() if isinstance(part, str) else part)
        sha.update(b"\0")
    return sha.hexdigest()[:24]
