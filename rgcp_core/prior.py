"""A prior: a denoising network, its noise schedule and the card that says what it is.

On disk a prior is a folder with ``card.json`` and ``model.safetensors``.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rgcp_core.damage import DetailLaw, pick_noise_step
from rgcp_core.errors import UserError
from rgcp_core.schedule import Schedule
from rgcp_core.theory import equal_snr_step
from rgcp_core.unet import UNet, UNetConfig

NoiseStep = int | Literal["auto"]
"""A setting's K: stated, or picked for each face by its damage."""
PAPER_NOISE_STEP = {256: 200, 512: 300}
"""K of the restoration by size (Table 1)."""

CARD_FILE = "card.json"
WEIGHTS_FILE = "model.safetensors"


class ScheduleConfig(BaseModel):
    """The noise schedule that a prior was trained with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    beta_start: float = Field(default=1e-4, description="Variance of the first step.")
    beta_end: float = Field(default=0.02, description="Variance of the last step.")
    steps: int = Field(default=1000, ge=1, description="T, the number of steps; betas grow linearly.")

    def build(self) -> Schedule:
        """The schedule itself."""
        return Schedule.linear(self.steps, self.beta_start, self.beta_end)


class Card(BaseModel):
    """What a prior is, where it comes from and what it may be used for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Name used on the command line.")
    architecture: UNetConfig = Field(description="Shape of the network.")
    schedule: ScheduleConfig = Field(default=ScheduleConfig(), description="Noise schedule.")
    crop_window: tuple[float, float, float, float] = Field(
        default=(0.0, 0.0, 1.0, 1.0),
        description="Part of the FFHQ-aligned square it was trained on: left, top, right, bottom in 0..1.",
    )
    noise_step: int | None = Field(
        default=None,
        description="K at which this prior was found to restore best; none: the paper's, carried to its size.",
    )
    detail: DetailLaw | None = Field(
        default=None, description="What detail clean pictures have, for K by damage; `rgcp prior evaluate` measures it."
    )
    sha256: str = Field(description="Of the weights file; checked when the prior is loaded.")
    licence: str = Field(description="What the weights may be used for.")
    source: str = Field(description="Where the weights come from.")
    training: Mapping[str, Any] = Field(default={}, description="Data, samples seen, hardware, hours.")
    heldout_eps_mse: Mapping[str, float] = Field(
        default={}, description="Denoising error on held-out faces by time t (mean squared error of eps)."
    )

    @property
    def image_size(self) -> int:
        """Side of the prior's pictures in pixels."""
        return self.architecture.image_size

    @property
    def usual_noise_step(self) -> int:
        """K for badly damaged faces: the card's own, or the paper's, carried to this size by `equal_snr_step`."""
        size = self.image_size
        if self.noise_step is not None:
            return self.noise_step
        alphas_cumprod = self.schedule.build().alphas_cumprod
        return PAPER_NOISE_STEP.get(size) or equal_snr_step(alphas_cumprod, PAPER_NOISE_STEP[256], 256, size)


def check_detail(card: Card) -> None:
    """Raise `UserError` where ``noise_step: auto`` has nothing to compare a face's detail with."""
    if card.detail is None:
        raise UserError(
            f"restore.noise_step=auto compares a face's detail with that of clean pictures, which the card of "
            f"{card.name!r} does not know. Measure it: rgcp prior evaluate {card.name} --heldout CLEAN_PICTURES "
            f"--write-card; or state a K: --set restore.noise_step={card.usual_noise_step}."
        )


@dataclass(frozen=True)
class Prior:
    """Network, schedule and card. A constrained prior has the same type: only the weights differ."""

    network: UNet
    schedule: Schedule
    card: Card

    @classmethod
    def load(cls, name_or_path: str | Path, device: torch.device | str = "cpu") -> Self:
        """Load a bundled prior, one of the user's (``RGCP_PRIORS_DIR``), or a folder, in float32 and eval mode.

        Raises:
            UserError: no such prior, an unreadable card, or weights that do not match the card.
        """
        folder = find_prior(name_or_path)
        card = read_card(folder)
        weights = folder / WEIGHTS_FILE
        if not weights.is_file():
            raise UserError(f"The prior {card.name!r} has a card but no weights: {weights} is missing.")
        found = file_sha256(weights)
        if found != card.sha256:
            raise UserError(
                f"The weights of the prior {card.name!r} do not match its card: sha256 {found[:12]}…, the card says "
                f"{card.sha256[:12]}…. Restore {weights} or import the prior again."
            )
        return cls.from_state_dict(load_file(weights), card, device)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], card: Card, device: torch.device | str = "cpu") -> Self:
        """Build the network that the card describes around ``state`` without initialising it first."""
        with torch.device("meta"):
            network = UNet(card.architecture)
        network.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
        return cls(network.to(device).eval().requires_grad_(False), card.schedule.build(), card)

    def noise_step_for(self, wanted: NoiseStep, y: Tensor) -> int:
        """The K of one face (3,S,S) in [-1,1]: the one that is stated, or for ``auto`` the one its damage asks for.

        Raises:
            UserError: ``auto``, and the card does not say what detail clean pictures have.
        """
        if wanted != "auto":
            return wanted
        check_detail(self.card)
        assert self.card.detail is not None
        return pick_noise_step(y, self.card.detail, self.schedule.alphas_cumprod, self.card.usual_noise_step)

    def save(self, folder: Path, dtype: torch.dtype = torch.float16) -> "Prior":
        """Write card and weights into ``folder``; the returned prior's card carries the sha256 of what was written."""
        return replace(self, card=write_prior(self.network.state_dict(), self.card, folder, dtype))


def write_prior(state: Mapping[str, Tensor], card: Card, folder: Path, dtype: torch.dtype | None = None) -> Card:
    """Write ``state`` (in ``dtype``; None keeps the tensors' own) and its card; the card with the sha256 returns."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{WEIGHTS_FILE}.tmp"
    save_file({key: value.to(dtype or value.dtype).contiguous() for key, value in state.items()}, temporary)
    temporary.chmod(0o644)  # safetensors makes files that only their owner can read
    card = card.model_copy(update={"sha256": file_sha256(temporary)})
    os.replace(temporary, folder / WEIGHTS_FILE)
    write_card(card, folder)
    return card


def read_card(folder: Path) -> Card:
    """Read ``card.json`` of a prior's folder."""
    path = folder / CARD_FILE
    try:
        return Card.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder} is not a prior: {CARD_FILE} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise UserError(f"{path} is not a valid card: {error}") from error


def write_card(card: Card, folder: Path) -> None:
    """Write ``card.json`` whole or not at all."""
    temporary = folder / f"{CARD_FILE}.tmp"
    temporary.write_text(card.model_dump_json(indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / CARD_FILE)


def prior_folders() -> list[Path]:
    """Folders that priors are looked up in: the user's (``RGCP_PRIORS_DIR``), then the bundled ones."""
    bundled = Path(str(resources.files("rgcp_core.priors")))
    own = os.environ.get("RGCP_PRIORS_DIR", Path.home() / ".local" / "share" / "rgcp" / "priors")
    return [Path(own), bundled]


def list_priors() -> list[Card]:
    """Cards of all priors that can be named, the user's first; of two with one name the first counts."""
    cards: dict[str, Card] = {}
    for folder in prior_folders():
        for path in sorted(folder.glob(f"*/{CARD_FILE}")):
            card = read_card(path.parent)
            cards.setdefault(card.name, card)
    return list(cards.values())


def find_prior(name_or_path: str | Path) -> Path:
    """Folder of a prior given by its name or by a path."""
    for folder in [Path(name_or_path), *(root / str(name_or_path) for root in prior_folders())]:
        if (folder / CARD_FILE).is_file():
            return folder
    known = ", ".join(sorted(card.name for card in list_priors())) or "none"
    raise UserError(f"No prior {str(name_or_path)!r}: neither a folder with {CARD_FILE} nor one of: {known}.")


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
