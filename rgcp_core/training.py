"""Training an unconditional prior.

Every draw of step i comes from a generator seeded with (seed, i): there is no random state to save, a resumed run
makes the draws that it would have made, and the number of devices does not change them.
"""

import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from rgcp_core.errors import UserError
from rgcp_core.evaluation import heldout_errors
from rgcp_core.images import save_image, to_uint8, write_atomically
from rgcp_core.loss import denoising_loss
from rgcp_core.prior import Card, Prior, ScheduleConfig
from rgcp_core.randomness import stream
from rgcp_core.sampling import sample
from rgcp_core.schedule import Schedule
from rgcp_core.training_data import Pictures
from rgcp_core.unet import PAPER_512, UNet, UNetConfig

STATE_FILE = "state.pt"
HISTORY_FILE = "history.json"
PRIOR_FOLDER = "prior"
FACE_WINDOW = (0.195, 0.285, 0.835, 0.925)


class TrainingConfig(BaseModel):
    """What decides the weights that come out, besides the data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: UNetConfig = Field(default=UNetConfig(), description="Shape of the network.")
    schedule: ScheduleConfig = Field(default=ScheduleConfig(), description="Noise schedule.")
    crop_window: tuple[float, float, float, float] = Field(
        default=(0.0, 0.0, 1.0, 1.0), description="Part of the FFHQ-aligned square that the pictures show."
    )
    iterations: int = Field(default=200_000, ge=1, description="Optimiser steps.")
    batch_size: int = Field(default=256, ge=1, description="Pictures a step, over all devices.")
    learning_rate: float = Field(default=1e-4, gt=0, description="Of Adam, without weight decay.")
    warmup_iterations: int = Field(default=0, ge=0, description="Steps over which the learning rate rises linearly.")
    gradient_clip: float = Field(default=1.0, gt=0, description="Largest norm of the gradient.")
    ema_halflife: float = Field(default=500_000, ge=0, description="Half-life of the averaged weights, in samples.")
    ema_rampup: float = Field(
        default=0.05, gt=0, description="The half-life is at most this fraction of the samples seen so far."
    )
    flips: bool = Field(default=True, description="Mirror every other picture, drawn at random.")
    seed: int = Field(default=0, description="Seed of all draws and of the fresh weights.")


_FACES_64 = UNetConfig(
    image_size=64,
    model_channels=64,
    channel_mult=(0.5, 1, 2, 4),
    num_res_blocks=1,
    attention_resolutions=(8,),
    num_head_channels=64,
    resblock_updown=False,
    dropout=0.0,
)
_FACES_128 = UNetConfig(
    image_size=128,
    model_channels=64,
    channel_mult=(1, 1, 2, 3, 4),
    num_res_blocks=1,
    attention_resolutions=(16, 8),
    num_head_channels=64,
    dropout=0.0,
)

CONFIGS: dict[str, TrainingConfig] = {
    "paper-256": TrainingConfig(),
    "paper-512": TrainingConfig(architecture=PAPER_512, batch_size=32, iterations=2_320_000),
    "afhq-dog-256": TrainingConfig(iterations=50_000),
    "afhq-cat-256": TrainingConfig(iterations=100_000),
    "faces64": TrainingConfig(
        architecture=_FACES_64,
        crop_window=FACE_WINDOW,
        batch_size=32,
        iterations=100_000,
        learning_rate=3e-4,
        warmup_iterations=100,
        ema_halflife=50_000,
        ema_rampup=0.1,
    ),
    "faces128": TrainingConfig(
        architecture=_FACES_128,
        crop_window=FACE_WINDOW,
        batch_size=64,
        iterations=100_000,
        learning_rate=3e-4,
        warmup_iterations=100,
        ema_halflife=100_000,
    ),
}
"""``paper-*`` and ``afhq-*`` are Table 1 of the supplement (its networks, batches, iterations and learning rates)."""


@dataclass(frozen=True)
class TrainingPlan:
    """Where a training goes and how it is run; on one device none of it changes the weights."""

    run_dir: Path
    name: str
    """Of the prior, for its card."""
    licence: str
    """For the card: what the weights may be used for."""
    minutes: float | None = None
    """Stop, with a checkpoint, after so many minutes of this call."""
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int | None = None
    evaluate_minutes: float = 20.0
    """How often the held-out error, the sample grid and the prior's folder are renewed; also at the end."""
    report_steps: int = 10
    """Steps between two reports; checkpoints fall on a report."""
    micro_batch_size: int | None = None
    """Pictures a forward pass on one device; a step adds up as many passes as its batch needs."""
    compile: bool = False
    """Compile the network: slow to start, faster on a GPU."""
    grid: int = 16
    """Samples in a grid; 0 for none."""
    grid_steps: int = 50


@dataclass(frozen=True)
class Progress:
    """Where a training stands; given to the callback at every report."""

    step: int
    steps: int
    samples: int
    loss: float
    """Mean noise error since the last report."""
    samples_per_second: float
    seconds_left: float


@dataclass
class _State:
    """All that a checkpoint holds."""

    network: UNet
    ema: UNet
    optimizer: torch.optim.Optimizer
    step: int = 0
    hours: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    heldout: list[tuple[int, dict[int, float]]] = field(default_factory=list)


def train(
    config: TrainingConfig,
    data: Pictures,
    plan: TrainingPlan,
    *,
    heldout: Pictures | None = None,
    start_from: Prior | None = None,
    fabric: Fabric | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Card:
    """Train until ``config.iterations`` or ``plan.minutes``; the same call again goes on where the last one stopped.

    ``run_dir`` then holds ``prior/`` (the averaged weights, a prior like any other), ``state.pt`` (the checkpoint),
    ``history.json`` (losses and held-out errors), ``samples/`` and TensorBoard's event files.

    Args:
        config: what to train.
        data: pictures of the network's size.
        plan: where to, how often to save.
        heldout: pictures that are not trained on; None leaves the held-out error out.
        start_from: begin with the weights of this prior instead of fresh ones; of the same architecture.
        fabric: devices and precision; None is one device in float32.
        on_progress: progress callback.

    Returns:
        The card of the trained prior.

    Raises:
        UserError: pictures of another size, another configuration than the checkpoint's, or a loss that is not finite.
    """
    # Begin, or go on from the checkpoint.
    for pictures in (data, heldout):
        if pictures is not None and pictures.size != config.architecture.image_size:
            raise UserError(
                f"The network takes pictures of {config.architecture.image_size} px; these are of {pictures.size} px."
            )
    fabric = fabric or Fabric(devices=1)
    state = _begin(config, plan, fabric, start_from)
    network: Any = torch.compile(state.network) if plan.compile else state.network
    model, optimizer = fabric.setup(network, state.optimizer)
    schedule = config.schedule.build()
    writer = SummaryWriter(str(plan.run_dir / "tensorboard"), purge_step=state.step) if fabric.is_global_zero else None
    began, hours_before = time.monotonic(), state.hours
    last_report = last_save = last_evaluation = began
    totals = torch.zeros(2, device=fabric.device)  # of the noise error and of the gradient's norm

    with torch.random.fork_rng(devices=[fabric.device] if fabric.device.type == "cuda" else []):
        while state.step < config.iterations:
            # One optimiser step.
            totals += _step(config, plan, state.step, data, model, optimizer, schedule, fabric)
            state.step += 1
            _update_ema(config, state)
            if state.step % plan.report_steps and state.step < config.iterations:
                continue

            # Report. The clock of the first process decides for all of them.
            steps = state.step - (state.losses[-1][0] if state.losses else 0)
            loss, gradient_norm = cast(Tensor, fabric.all_reduce(totals / steps, reduce_op="mean")).tolist()
            totals.zero_()
            if not math.isfinite(loss + gradient_norm):
                raise UserError(
                    f"Training diverged by step {state.step}: loss {loss}, gradient {gradient_norm}. Lower the "
                    f"learning rate (now {config.learning_rate:g}); the last checkpoint is in {plan.run_dir}."
                )
            state.losses.append((state.step, loss))
            now = float(fabric.broadcast(time.monotonic() - began)) + began
            speed = steps * config.batch_size / max(now - last_report, 1e-9)
            left = (config.iterations - state.step) * config.batch_size / speed
            out_of_time = False
            if plan.minutes is not None:
                left = max(0.0, min(left, began + 60 * plan.minutes - now))
                out_of_time = now - began >= 60 * plan.minutes
            last_report = now
            if writer is not None:
                writer.add_scalar("loss", loss, state.step)
                writer.add_scalar("gradient_norm", gradient_norm, state.step)
                writer.add_scalar("samples_per_second", speed, state.step)
            if on_progress is not None and fabric.is_global_zero:
                samples = state.step * config.batch_size
                on_progress(Progress(state.step, config.iterations, samples, loss, speed, left))

            # Save.
            over = out_of_time or state.step == config.iterations
            by_step = plan.checkpoint_steps is not None and state.step % plan.checkpoint_steps == 0
            if over or by_step or now - last_save >= 60 * plan.checkpoint_minutes:
                state.hours = hours_before + (now - began) / 3600
                if over or now - last_evaluation >= 60 * plan.evaluate_minutes:
                    if writer is not None:
                        _publish(config, plan, state, data, heldout, start_from, fabric, writer)
                    last_evaluation = now
                if fabric.is_global_zero:
                    _save(config, plan, state)
                fabric.barrier()
                last_save = now
            if out_of_time:
                break
    if writer is not None:
        writer.close()
    return _card(config, plan, state, data, start_from, fabric)


def make_fabric(accelerator: str = "auto", precision: str = "auto") -> Fabric:
    """One device, or as many as torchrun started processes for, on as many machines.

    Args:
        accelerator: auto, cpu, cuda or mps.
        precision: bf16-mixed, 32-true, or auto: bf16 on CUDA, float32 elsewhere.
    """
    if precision == "auto":
        cuda = accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
        precision = "bf16-mixed" if cuda else "32-true"
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # these two are torchrun's
    nodes = int(os.environ.get("WORLD_SIZE", 1)) // devices
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, precision=cast(Any, precision))
    fabric.launch()
    return fabric


def _begin(config: TrainingConfig, plan: TrainingPlan, fabric: Fabric, start_from: Prior | None) -> _State:
    """Network, average and optimiser on the device: from the checkpoint, from a prior or fresh."""
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    if start_from is not None:
        ours, theirs = config.architecture.model_dump(), start_from.card.architecture.model_dump()
        differing = [f"{name} is {theirs[name]}, not {ours[name]}" for name in ours if ours[name] != theirs[name]]
        if [line for line in differing if not line.startswith("dropout ")]:
            raise UserError(f"Cannot start from {start_from.card.name!r}, another network: {'; '.join(differing)}.")
    with torch.random.fork_rng():
        torch.manual_seed(stream(config.seed, "network", "train").initial_seed())
        network = UNet(config.architecture)
    if start_from is not None:
        network.load_state_dict(start_from.network.state_dict())
    network = network.to(fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=True)
    state = _State(network, ema, optimizer)

    path = plan.run_dir / STATE_FILE
    if not path.is_file():
        return state
    saved = torch.load(path, map_location=fabric.device, weights_only=True)
    before = _decisive(TrainingConfig.model_validate(saved["config"]))
    for name, value in _decisive(config).items():
        if value != before[name]:
            raise UserError(
                f"{path} was trained with {name} = {before[name]}, not {value}. Use the same configuration to go on, "
                "or another output folder to start anew."
            )
    network.load_state_dict(saved["network"])
    ema.load_state_dict(saved["ema"])
    optimizer.load_state_dict(saved["optimizer"])
    state.step, state.hours = saved["step"], saved["hours"]
    state.losses, state.heldout = saved["losses"], saved["heldout"]
    return state


def _decisive(config: TrainingConfig) -> dict[str, Any]:
    """The settings that a resumed run must share; it may train for longer."""
    return config.model_dump(mode="json", exclude={"iterations"})


def _step(
    config: TrainingConfig,
    plan: TrainingPlan,
    step: int,
    data: Pictures,
    model: Any,
    optimizer: Any,
    schedule: Schedule,
    fabric: Fabric,
) -> Tensor:
    """One optimiser step; (2,) the mean noise error of this device's share of the batch and the gradient's norm."""
    # Every device draws the whole batch and takes its share: their number does not change the draws.
    draws = torch.Generator(fabric.device).manual_seed(_seed(config, step))
    where: dict[str, Any] = {"generator": draws, "device": fabric.device}
    size, n = config.architecture.image_size, config.batch_size
    rows = torch.randint(len(data), (n,), **where)
    flips = torch.rand(n, **where) < (0.5 if config.flips else 0.0)
    t = torch.randint(schedule.steps, (n,), **where)
    eps = torch.randn((n, 3, size, size), **where)
    share = slice(fabric.global_rank, None, fabric.world_size)
    rows, flips, t, eps = rows[share], flips[share], t[share], eps[share]
    torch.manual_seed(_seed(config, step, f"dropout{fabric.global_rank}"))

    warmup = min(1.0, (step + 1) / max(1, config.warmup_iterations))
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * warmup
    optimizer.zero_grad()
    mse = torch.zeros((), device=fabric.device)
    parts = torch.arange(len(rows)).split(plan.micro_batch_size or len(rows))
    for i, part in enumerate(parts):
        x_0 = data[rows[part]].to(fabric.device)
        x_0 = torch.where(flips[part, None, None, None], x_0.flip(-1), x_0)
        with fabric.no_backward_sync(model, enabled=i < len(parts) - 1):
            loss = denoising_loss(model, x_0, t[part], eps[part], schedule)
            fabric.backward(loss.total.sum() / len(rows))
        mse += loss.mse.detach().sum() / len(rows)
    norm = fabric.clip_gradients(model, optimizer, max_norm=config.gradient_clip, error_if_nonfinite=False)
    optimizer.step()
    return torch.stack([mse, cast(Tensor, norm)])


def _seed(config: TrainingConfig, step: int, purpose: str = "draws") -> int:
    return stream(config.seed, f"step{step}", f"train/{purpose}").initial_seed()


@torch.no_grad()
def _update_ema(config: TrainingConfig, state: _State) -> None:
    """Exponential average with a half-life in samples that grows with the training (Karras et al. 2024, EDM2)."""
    halflife = min(config.ema_halflife, config.ema_rampup * state.step * config.batch_size)
    decay = 0.5 ** (config.batch_size / max(halflife, 1e-8))
    for average, parameter in zip(state.ema.parameters(), state.network.parameters(), strict=True):
        average.lerp_(parameter, 1 - decay)


def _save(config: TrainingConfig, plan: TrainingPlan, state: _State) -> None:
    """Write the checkpoint whole or not at all, even when the machine stops."""
    checkpoint = {
        "config": _decisive(config),
        "network": state.network.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
        "hours": state.hours,
        "losses": state.losses,
        "heldout": state.heldout,
    }
    temporary = plan.run_dir / f"{STATE_FILE}.tmp"
    with temporary.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, plan.run_dir / STATE_FILE)
    history = {"losses": state.losses, "heldout": state.heldout}
    write_atomically(plan.run_dir / HISTORY_FILE, json.dumps(history, indent=1).encode())


def _publish(
    config: TrainingConfig,
    plan: TrainingPlan,
    state: _State,
    data: Pictures,
    heldout: Pictures | None,
    start_from: Prior | None,
    fabric: Fabric,
    writer: SummaryWriter,
) -> None:
    """Evaluate the averaged weights and write them as a prior, with a grid of samples."""
    schedule = config.schedule.build()
    if heldout is not None:
        errors = heldout_errors(state.ema, heldout, schedule, device=fabric.device)
        state.heldout.append((state.step, errors))
        for t, error in errors.items():
            writer.add_scalar(f"heldout_eps_mse/t{t}", error, state.step)
    if plan.grid:
        size = config.architecture.image_size
        streams = [stream(config.seed, f"sample{i}", "grid") for i in range(plan.grid)]
        steps = min(plan.grid_steps, schedule.steps)
        samples = sample(state.ema, (3, size, size), schedule, generators=streams, device=fabric.device, steps=steps)
        grid = image_grid(samples)
        save_image(grid, plan.run_dir / "samples" / f"{state.step:07d}.png")
        writer.add_image("samples", to_uint8(grid), state.step, dataformats="HWC")
    card = _card(config, plan, state, data, start_from, fabric)
    Prior(state.ema, schedule, card).save(plan.run_dir / PRIOR_FOLDER)


def image_grid(images: Tensor) -> Tensor:
    """Images (N,3,H,W) side by side in a square-ish grid (3,H',W'), in [-1,1]."""
    return make_grid(images.cpu(), nrow=math.ceil(math.sqrt(len(images))), padding=2, pad_value=1.0)


def _card(
    config: TrainingConfig,
    plan: TrainingPlan,
    state: _State,
    data: Pictures,
    start_from: Prior | None,
    fabric: Fabric,
) -> Card:
    if fabric.device.type == "cuda":
        hardware = f"{fabric.world_size} x {torch.cuda.get_device_name(fabric.device)}"
    else:
        hardware = f"{fabric.world_size * torch.get_num_threads()} CPU threads"
    training: dict[str, Any] = {
        "data": data.source,
        "pictures": len(data),
        "samples_seen": state.step * config.batch_size,
        "iterations": state.step,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "hardware": hardware,
        "precision": fabric._precision.precision,
        "hours": round(state.hours, 2),
    }
    if start_from is not None:
        before = start_from.card
        training["started_from"] = {
            "name": before.name,
            "sha256": before.sha256,
            "samples_seen": before.training.get("samples_seen"),
        }
    return Card(
        name=plan.name,
        architecture=config.architecture,
        schedule=config.schedule,
        crop_window=config.crop_window,
        sha256="",
        licence=plan.licence,
        source=f"trained with `rgcp prior train` on {data.source}",
        training=training,
        heldout_eps_mse={str(t): round(e, 5) for t, e in state.heldout[-1][1].items()} if state.heldout else {},
    )
