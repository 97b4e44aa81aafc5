"""Training a prior: files and settings in, one core call, a prior's folder out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rgcp_core.errors import UserError
from rgcp_core.memorisation import NEIGHBOURS, without_copies
from rgcp_core.prior import Card, Prior
from rgcp_core.training import CONFIGS, Progress, TrainingConfig, TrainingPlan, make_fabric, train
from rgcp_core.training_data import load_pictures


class TrainingRequest(BaseModel):
    """What ``rgcp prior train`` and the flow are asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Path = Field(description="Folder of pictures, or Parquet with a column 'image'.")
    config: str = Field(description="Name of a training configuration.")
    out: Path = Field(description="Folder of the run; an earlier run there is resumed.")
    heldout: Path | None = Field(default=None, description="Pictures to measure on.")
    start_from: str | None = Field(default=None, description="Prior whose weights to start from.")
    name: str | None = Field(default=None, description="Name of the new prior.")
    licence: str | None = Field(default=None, description="What the weights may be used for.")
    changes: dict[str, Any] = Field(default={}, description="Settings of the configuration to replace.")
    minutes: float | None = Field(default=None, gt=0, description="Stop after so many minutes.")
    micro_batch_size: int | None = Field(default=None, ge=1, description="Pictures a forward pass.")
    precision: str = Field(default="auto", description="auto, bf16-mixed or 32-true.")
    accelerator: str = Field(default="auto", description="auto, cpu, cuda or mps.")
    compile: bool = Field(default=False, description="Compile the network.")
    checkpoint_minutes: float = Field(default=5.0, gt=0, description="Minutes between checkpoints.")
    checkpoint_steps: int | None = Field(default=None, ge=1, description="Steps between checkpoints, besides.")
    evaluate_minutes: float = Field(default=20.0, gt=0, description="Minutes between evaluations.")

    def training_config(self) -> TrainingConfig:
        """The named configuration with its changes."""
        if self.config not in CONFIGS:
            raise UserError(f"Unknown configuration {self.config!r}; there are: {', '.join(CONFIGS)}.")
        try:
            return TrainingConfig.model_validate(CONFIGS[self.config].model_dump() | self.changes)
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
            raise UserError("Unusable training settings: " + "; ".join(lines)) from error


def run_training(request: TrainingRequest, on_progress: Callable[[Progress], None]) -> Card | None:
    """Train as requested; the card of the prior, or None on the processes that do not write it."""
    config = request.training_config()
    fabric = make_fabric(request.accelerator, request.precision)
    start = Prior.load(request.start_from) if request.start_from is not None else None
    inherited = start.card.licence if start is not None else "not stated; it depends on the training pictures"
    size = config.architecture.image_size
    data = load_pictures(request.data, size)
    heldout = None
    if request.heldout is not None:
        heldout = load_pictures(request.heldout, size)
        if len(data) >= NEIGHBOURS:
            heldout = without_copies(heldout, data)
    plan = TrainingPlan(
        run_dir=request.out,
        name=request.name or request.config,
        licence=request.licence or inherited,
        minutes=request.minutes,
        checkpoint_minutes=request.checkpoint_minutes,
        checkpoint_steps=request.checkpoint_steps,
        evaluate_minutes=request.evaluate_minutes,
        micro_batch_size=request.micro_batch_size,
        compile=request.compile,
    )
    card = train(config, data, plan, heldout=heldout, start_from=start, fabric=fabric, on_progress=on_progress)
    return card if fabric.is_global_zero else None
