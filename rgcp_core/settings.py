"""Every constant of a restoration as a setting with a sentence, and the presets.

The presets state noise steps for 256 px, where the paper states them, and `load_settings` carries them to the prior's
own size: noise of a given step hides less of a large picture than of a small one.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rgcp_core.compute import Precision
from rgcp_core.constrain import LearningRateDecay, Parameters
from rgcp_core.errors import UserError
from rgcp_core.prior import PAPER_NOISE_STEP, Card, check_detail
from rgcp_core.sampling import GuidanceDistance
from rgcp_core.schedule import check_noise_step
from rgcp_core.theory import equal_snr_step

PresetName = Literal["fast", "balanced", "paper"]
REFERENCE_SIZE = 256
"""Side in pixels of the pictures for which the presets state their noise steps."""


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def deciding(self) -> dict[str, Any]:
        """Values for a key. What is none is left out, so that a new optional setting leaves old keys as they are."""
        return self.model_dump(exclude_none=True)


class AlbumSettings(_Group):
    """The generative album."""

    size: int = Field(default=16, ge=1, description="Pictures in the album.")
    noise_step: int = Field(default=600, ge=1, description="K to which the degraded face is noised for the album.")
    steps: int | None = Field(default=None, ge=2, description="Denoising steps, evenly spaced; none visits all K.")
    guidance_interval: int = Field(
        default=20, ge=0, description="Guide once every n diffusion steps; 1 is every step, 0 never."
    )
    guidance_scale: float = Field(default=0.3, ge=0, description="Weight lambda of the guidance.")
    guidance_distance: GuidanceDistance = Field(
        default="l2",
        description="Distance to the degraded face: l2 (released code), l2_squared (Eq. 6) or l1 (text).",
    )

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `generate_album`; the size is the number of its generators."""
        return self.model_dump(exclude={"size"})


class ConstrainSettings(_Group):
    """Fine-tuning the prior on the album."""

    iterations: int = Field(default=3000, ge=0, description="Optimiser steps.")
    batch_size: int = Field(default=4, ge=1, description="Anchors a step.")
    learning_rate: float = Field(default=1e-5, gt=0, description="Learning rate of Adam.")
    learning_rate_decay: LearningRateDecay = Field(
        default="none", description="linear falls to zero (released code); none stays (paper)."
    )
    times: Literal["all", "below_noise_step"] = Field(
        default="all", description="Times t to train at: all T (paper), or only those the restoration visits."
    )
    parameters: Parameters = Field(
        default="all", description="Weights that move: all (paper), norms only, or low_rank changes of convolutions."
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop when the loss of a quarter of the album, held out, has not fallen for so many steps.",
    )
    settled: float | None = Field(
        default=None,
        gt=0,
        description="Stop when a draft of the restored face moved by less than so many of 255 levels in 25 steps.",
    )

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `constrain_prior`; which times are trained depends on the restoration's K."""
        return self.model_dump(exclude={"times"})

    def t_end(self, noise_step: int) -> int | None:
        """Times below this are trained for a restoration from K = ``noise_step``; None: all T."""
        return noise_step if self.times == "below_noise_step" else None


class RestoreSettings(_Group):
    """The restoration itself."""

    noise_step: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default=PAPER_NOISE_STEP[256],
        description="K to which the degraded face is noised; auto picks it for each face from its damage.",
    )
    steps: int | None = Field(default=None, ge=2, description="Denoising steps, evenly spaced; none visits all K.")


class FaceSettings(_Group):
    """Which faces of a photo are restored."""

    detector: Literal["auto", "offline", "facexlib"] = Field(
        default="auto",
        description="auto takes facexlib when its weights are there, else the offline network.",
    )
    min_score: float = Field(default=0.8, ge=0, le=1, description="Detections below this score are skipped.")
    min_size: float = Field(
        default=16.0, gt=0, description="Faces whose box is narrower, in photo pixels, are skipped."
    )
    max_enlargement: float = Field(
        default=4.0,
        gt=0,
        description="Skip faces this many times larger than the prior's picture: they would blur.",
    )


class GateSettings(_Group):
    """Which results are kept: a face restored as somebody else stays as it was."""

    enabled: bool = Field(default=True, description="Whether a result is refused at all; it is measured either way.")
    min_input: float = Field(
        default=0.92,
        ge=-1,
        le=1,
        description="Smallest cosine (dlib) of input and result at the input's sharpness: see `rgcp_core.gate`.",
    )
    min_input_personal: float = Field(
        default=0.935,
        ge=-1,
        le=1,
        description="The same where the face was restored with a personal album, which may be somebody else's.",
    )
    min_album: float = Field(
        default=0.92,
        ge=-1,
        le=1,
        description="Smallest mean cosine of the result with a personal album that it was restored with.",
    )
    candidates: int = Field(
        default=1, ge=1, description="Restorations drawn with different noise; the best by identity is kept."
    )
    person_named: float = Field(
        default=0.92,
        ge=-1,
        le=1,
        description="Smallest mean cosine with a person's album when --person names her: see `people.match`.",
    )
    person_auto: float = Field(
        default=0.935,
        ge=-1,
        le=1,
        description="The same for --person auto, where every face is compared with everybody known.",
    )
    person_margin: float = Field(
        default=0.01, ge=0, description="By how much the second nearest person must be farther, for --person auto."
    )


class Settings(_Group):
    """All that decides the pixels of a run, besides its inputs and the prior's weights."""

    preset: str = Field(default="paper", description="Preset that the settings started from.")
    seed: int = Field(default=0, description="Seed of all random streams.")
    precision: Precision = Field(
        default="float32",
        description="What the networks compute in: float32; tf32, which is float32 where the device has none; or "
        "bfloat16. Weights are float32 in any case.",
    )
    compiled: bool = Field(
        default=False,
        description="Compile the network, once a process: minutes at the start, for faces that cost less. On a GPU "
        "with CUDA graphs.",
    )
    album: AlbumSettings = Field(default=AlbumSettings(), description="The generative album.")
    constrain: ConstrainSettings = Field(default=ConstrainSettings(), description="Fine-tuning on the album.")
    restore: RestoreSettings = Field(default=RestoreSettings(), description="The restoration.")
    faces: FaceSettings = Field(default=FaceSettings(), description="Which faces are restored.")
    gate: GateSettings = Field(default=GateSettings(), description="Which results are kept.")

    def for_prior(self, card: Card) -> "Settings":
        """A preset, stated for 256 px, carried to a prior: its noise steps and its guidance interval.

        ``SNR(K) * size^2`` stays constant (see `equal_snr_step`) and so does the number of guided steps. The
        restoration's K is `Card.usual_noise_step`, or picked for each face where the preset says so and the card knows
        what detail clean pictures have.
        """
        alphas_cumprod = card.schedule.build().alphas_cumprod
        size = card.image_size
        album_step = equal_snr_step(alphas_cumprod, self.album.noise_step, REFERENCE_SIZE, size)
        interval = round(self.album.guidance_interval * album_step / self.album.noise_step)
        picked = self.restore.noise_step == "auto" and card.detail is not None
        restore_step = "auto" if picked else card.usual_noise_step
        return self.model_copy(
            update={
                "album": self.album.model_copy(update={"noise_step": album_step, "guidance_interval": interval}),
                "restore": self.restore.model_copy(update={"noise_step": restore_step}),
            }
        )

    def at_one_noise_step(self, card: Card) -> "Settings":
        """The same, with the prior's usual K for all faces where one is picked for each: to compare like with like."""
        if self.restore.noise_step != "auto":
            return self
        stated = self.restore.model_copy(update={"noise_step": card.usual_noise_step})
        return self.model_copy(update={"restore": stated})

    def deciding(self) -> dict[str, Any]:
        """As of every group; and the network as it is written leaves keys as they are."""
        return {name: value for name, value in super().deciding().items() if (name, value) != ("compiled", False)}

    def arithmetic(self) -> list[str]:
        """What the keys of a face's stages say about how the networks compute: compiled code rounds otherwise."""
        return [self.precision, *(["compiled"] if self.compiled else [])]

    def digest(self) -> str:
        """sha256 over all settings: part of every key."""
        return hashlib.sha256(json.dumps(self.deciding(), sort_keys=True).encode()).hexdigest()


PRESETS: dict[PresetName, Settings] = {
    "paper": Settings(preset="paper", precision="tf32"),
    "balanced": Settings(
        preset="balanced",
        precision="bfloat16",
        album=AlbumSettings(steps=60),
        constrain=ConstrainSettings(
            iterations=400, learning_rate=8e-5, learning_rate_decay="linear", times="below_noise_step"
        ),
        restore=RestoreSettings(noise_step="auto"),
    ),
    "fast": Settings(
        preset="fast",
        precision="bfloat16",
        album=AlbumSettings(size=8, steps=30, guidance_interval=40),
        constrain=ConstrainSettings(
            iterations=80, learning_rate=4e-4, learning_rate_decay="linear", times="below_noise_step"
        ),
        restore=RestoreSettings(noise_step="auto", steps=50),
    ),
}
"""`paper` is Table 1 of the supplement; the others spend less, in the order of their names.

The published code computed convolutions in TF32 where the GPU had it, by PyTorch's own default; a CPU has none, and
there it is float32.
"""


PERSONAL: dict[PresetName, ConstrainSettings] = {
    "paper": ConstrainSettings(iterations=5000),
    "balanced": ConstrainSettings(iterations=1500, learning_rate=5e-5),
    "fast": ConstrainSettings(iterations=300, learning_rate=1e-4),
}
"""Fine-tuning on a personal album (`paper`: Table 1). At all times t, so that one personal prior serves every noise
step and can draw the person on its own."""


def load_settings(preset: str, card: Card, overrides: Mapping[str, Any] | None = None) -> Settings:
    """A preset at a prior's size, with some settings replaced, e.g. ``{"seed": 1, "restore": {"noise_step": 80}}``.

    Replacements are taken as they are: a noise step is one of the prior's own 1..T.

    Raises:
        UserError: an unknown preset or key, a value out of range, or a noise step beyond T.
    """
    if preset not in PRESETS:
        raise UserError(f"Unknown preset {preset!r}; there are: {', '.join(PRESETS)}.")
    values = PRESETS[preset].for_prior(card).model_dump()
    for key, value in (overrides or {}).items():
        values[key] = values[key] | value if isinstance(value, dict) and isinstance(values.get(key), dict) else value
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        raise UserError("Unusable settings: " + "; ".join(lines)) from error
    for noise_step in (settings.album.noise_step, settings.restore.noise_step):
        if noise_step == "auto":
            check_detail(card)
        else:
            check_noise_step(noise_step, card.schedule.build())
    return settings
