"""Every constant of a restoration as a setting with a sentence, and the presets.

Noise steps are stated for 256 px, where the paper states them, and `Settings.for_size` carries them to the prior's
own size: noise of a given step hides less of a large picture than of a small one.
"""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rgcp_core.constrain import LearningRateDecay
from rgcp_core.errors import UserError
from rgcp_core.sampling import GuidanceDistance
from rgcp_core.schedule import Schedule, check_noise_step
from rgcp_core.theory import equal_snr_step

PresetName = Literal["fast", "balanced", "paper"]
REFERENCE_SIZE = 256
"""Side in pixels of the pictures for which the presets state their noise steps."""


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AlbumSettings(_Group):
    """The generative album."""

    size: int = Field(default=16, ge=1, description="Pictures in the album.")
    noise_step: int = Field(
        default=600, ge=1, description="K to which the degraded face is noised for the album."
    )
    steps: int | None = Field(
        default=None, ge=2, description="Denoising steps, evenly spaced; none visits all K."
    )
    guidance_interval: int = Field(
        default=20, ge=0, description="Guide once every n diffusion steps; 1 is every step, 0 never."
    )
    guidance_scale: float = Field(default=0.3, ge=0, description="Weight lambda of the guidance.")
    guidance_distance: GuidanceDistance = Field(
        default="l2",
        description="Distance to the degraded face: l2 (released code), l2_squared (Eq. 6) or l1 (text).",
    )


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


class RestoreSettings(_Group):
    """The restoration itself."""

    noise_step: int = Field(default=200, ge=1, description="K to which the degraded face is noised.")
    steps: int | None = Field(
        default=None, ge=2, description="Denoising steps, evenly spaced; none visits all K."
    )


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


class Settings(_Group):
    """All that decides the pixels of a run, besides its inputs and the prior's weights."""

    preset: str = Field(default="paper", description="Preset that the settings started from.")
    seed: int = Field(default=0, description="Seed of all random streams.")
    album: AlbumSettings = Field(default=AlbumSettings(), description="The generative album.")
    constrain: ConstrainSettings = Field(default=ConstrainSettings(), description="Fine-tuning on the album.")
    restore: RestoreSettings = Field(default=RestoreSettings(), description="The restoration.")
    faces: FaceSettings = Field(default=FaceSettings(), description="Which faces are restored.")

    def for_size(self, image_size: int, schedule: Schedule) -> "Settings":
        """The same settings with noise steps and guidance interval carried from 256 px to ``image_size``.

        ``SNR(K) * size^2`` stays constant (see `equal_snr_step`), and the number of guided steps stays as well. At
        512 px the restoration uses the paper's own K = 300, where the rule says 331.
        """
        for noise_step in (self.album.noise_step, self.restore.noise_step):
            check_noise_step(noise_step, schedule)

        def scaled(noise_step: int) -> int:
            return equal_snr_step(schedule.alphas_cumprod, noise_step, REFERENCE_SIZE, image_size)

        restore_step = scaled(self.restore.noise_step)
        if image_size == 512 and self.restore.noise_step == 200:
            restore_step = 300
        album_step = scaled(self.album.noise_step)
        interval = self.album.guidance_interval
        if interval > 1:
            interval = max(1, round(interval * album_step / self.album.noise_step))
        return self.model_copy(
            update={
                "album": self.album.model_copy(
                    update={"noise_step": album_step, "guidance_interval": interval}
                ),
                "restore": self.restore.model_copy(update={"noise_step": restore_step}),
            }
        )

    def digest(self) -> str:
        """sha256 over all settings: part of every key."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


PRESETS: dict[PresetName, Settings] = {
    "paper": Settings(preset="paper"),
    "balanced": Settings(
        preset="balanced",
        album=AlbumSettings(steps=60),
        constrain=ConstrainSettings(iterations=600, learning_rate=3e-5, times="below_noise_step"),
    ),
    "fast": Settings(
        preset="fast",
        album=AlbumSettings(size=8, steps=30, guidance_interval=40),
        constrain=ConstrainSettings(iterations=150, learning_rate=5e-5, times="below_noise_step"),
    ),
}
"""`paper` is Table 1 of the supplement; the others spend less, in the order of their names."""


def load_settings(preset: str, overrides: dict[str, Any] | None = None) -> Settings:
    """A preset with some settings replaced, e.g. ``{"seed": 1, "album": {"size": 8}}``.

    Raises:
        UserError: an unknown preset or key, or a value out of range.
    """
    if preset not in PRESETS:
        raise UserError(f"Unknown preset {preset!r}; there are: {', '.join(PRESETS)}.")
    values = PRESETS[preset].model_dump()
    for key, value in (overrides or {}).items():
        values[key] = (
            values[key] | value if isinstance(value, dict) and isinstance(values.get(key), dict) else value
        )
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        raise UserError("Unusable settings: " + "; ".join(lines)) from error
