"""``rgcp prior``: list, look at, import, pull, train, sample, compare and export priors."""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from rgcp_core.errors import UserError
from rgcp_core.prior import Card, Prior, list_priors
from rgcp_core.training import CONFIGS, Progress, TrainingConfig, TrainingPlan, make_fabric, train
from rgcp_core.training_data import load_pictures
from rgcp_core.unet import UNet

app = typer.Typer(no_args_is_help=True, help="Priors: list, info, import, pull, train, sample, evaluate, export.")
console = Console()


def _config(name: str, changes: dict[str, object]) -> TrainingConfig:
    if name not in CONFIGS:
        raise UserError(f"Unknown configuration {name!r}; there are: {', '.join(CONFIGS)}.")
    given = {key: value for key, value in changes.items() if value is not None}
    return TrainingConfig.model_validate(CONFIGS[name].model_dump() | given)


@app.command("list")
def list_command() -> None:
    """List the priors that can be named."""
    table = Table("name", "size", "parameters", "samples seen", "licence")
    for card in list_priors():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in UNet(card.architecture).parameters())
        seen = card.training.get("samples_seen")
        samples = f"{seen:,}" if isinstance(seen, int) else "not stated"
        table.add_row(card.name, f"{card.image_size} px", f"{parameters / 1e6:.1f} M", samples, card.licence)
    console.print(table)


@app.command("train")
def train_command(
    data: Annotated[Path, typer.Argument(help="Folder of pictures, or Parquet with a column 'image'.")],
    config: Annotated[str, typer.Option(help=f"One of: {', '.join(CONFIGS)}.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; the same command again resumes it.")],
    heldout: Annotated[Path | None, typer.Option(help="Pictures to measure on, never trained on.")] = None,
    start_from: Annotated[str | None, typer.Option("--from", help="Prior whose weights to start from.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the new prior; the configuration's by default.")] = None,
    licence: Annotated[str | None, typer.Option(help="What the weights may be used for, given their data.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop, with a checkpoint, after so many minutes.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures a step, over all devices.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Pictures a forward pass, to save memory.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam.")] = None,
    ema_halflife: Annotated[float | None, typer.Option(help="Of the averaged weights, in samples.")] = None,
    times: Annotated[str | None, typer.Option(help="Distribution of t: uniform or low.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all draws.")] = None,
    precision: Annotated[str, typer.Option(help="bf16-mixed, 32-true, or auto: bf16 on CUDA.")] = "auto",
    accelerator: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    devices: Annotated[str, typer.Option(help="Devices of each machine: a number, or auto for all.")] = "1",
    nodes: Annotated[int, typer.Option(help="Machines; start the command on each with torchrun.")] = 1,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network.")] = False,
    checkpoint_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 5.0,
    checkpoint_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints, besides.")] = None,
    evaluate_minutes: Annotated[float, typer.Option(help="Minutes between evaluations with a grid.")] = 20.0,
) -> None:
    """Train a prior, or go on with a training that stopped."""
    settings = _config(
        config,
        {
            "iterations": iterations,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "ema_halflife": ema_halflife,
            "times": times,
            "seed": seed,
        },
    )
    start = Prior.load(start_from) if start_from is not None else None
    plan = TrainingPlan(
        run_dir=out,
        name=name or config,
        licence=licence or (start.card.licence if start else "not stated; it depends on the training data"),
        minutes=minutes,
        checkpoint_minutes=checkpoint_minutes,
        checkpoint_steps=checkpoint_steps,
        evaluate_minutes=evaluate_minutes,
        micro_batch_size=micro_batch_size,
        compile=compile,
    )
    size = settings.architecture.image_size
    fabric = make_fabric(accelerator, devices, nodes, precision)
    card = train(
        settings,
        load_pictures(data, size),
        plan,
        heldout=load_pictures(heldout, size) if heldout is not None else None,
        start_from=start,
        fabric=fabric,
        on_progress=_Printer(),
    )
    if fabric.is_global_zero:
        print_card(card)
        console.print(f"The prior is {out / 'prior'}; use it as --prior {out / 'prior'}.")


class _Printer:
    """Prints a line of progress every so often."""

    def __init__(self, every_seconds: float = 15.0) -> None:
        self.every, self.last = every_seconds, 0.0

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() - self.last < self.every and progress.step < progress.steps:
            return
        self.last = time.monotonic()
        left = time.strftime("%H:%M:%S", time.gmtime(progress.seconds_left % 86400))
        days = f"{int(progress.seconds_left // 86400)} d " if progress.seconds_left >= 86400 else ""
        console.print(
            f"step {progress.step:,}/{progress.steps:,}  {progress.samples:,} samples  loss {progress.loss:.5f}  "
            f"{progress.samples_per_second:.1f} samples/s  {days}{left} left",
            highlight=False,
        )


def print_card(card: Card) -> None:
    """Print what a prior is."""
    console.print_json(card.model_dump_json())


if __name__ == "__main__":
    app()
