"""Time every stage of a face, ours by preset against the plain reference (`benchmarks/reference.py`), in one process.

    python -m benchmarks.speed --threads 2 --faces 5 --scale 0.002 --out results/speed
    python -m benchmarks.speed --device cuda --prior random256 --scale 0.01 --out results/speed-cuda
    python -m benchmarks.speed --steady 50

Reference and presets take turns, face by face, so that what else the machine does meets all of them; reported are
medians over the faces and medians of the ratios within a face. With --scale below 1 only so large a share of each loop
is run and its steps are taken for all the others, which cost the same: the tables then say "extrapolated". Weights of
`random256` are random: the architecture of the paper's 256 px prior, whose weights decide nothing about time.

Writes stages.parquet, speed.json and speed.md into --out.
"""

import argparse
import copy
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import reference
from rgcp_core.compute import check_compiler, computing
from rgcp_core.constrain import constrain_prior
from rgcp_core.faces.align import align_face, crop_face
from rgcp_core.faces.detect import load_detector
from rgcp_core.faces.paste import paste_face
from rgcp_core.images import load_photo, save_photo
from rgcp_core.loss import Model, denoising_loss
from rgcp_core.metrics import measure_faces
from rgcp_core.prior import Card, Prior
from rgcp_core.randomness import stream
from rgcp_core.sampling import Guidance, denoise, noise_to, restore
from rgcp_core.schedule import visited_times
from rgcp_core.settings import PRESETS, Settings, load_settings
from rgcp_core.unet import UNet, UNetConfig

now = time.perf_counter
"""Of the wall, or of the processor with --processor-time."""
REFERENCE = "reference"
STAGES = ("input and output", "album", "fine-tuning", "restoration", "metrics")
TRAINING, GUIDED = 3, 2
"""Forward passes that a training step and a guided step count as: with the gradients of weights and input, or one."""


@dataclass(frozen=True)
class Measured:
    """One stage of one face."""

    variant: str
    stage: str
    face: int
    seconds: float
    forward_equivalents: float
    gflop: float
    peak_memory_bytes: int
    """Of the process; on an accelerator what the stage needed beyond what was in use before it."""
    measured_steps: int
    all_steps: int


# ------------------------------------------------------------------------------------------------- clocks and memory


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> int:
    """Begin a new peak of memory and return the accelerator's bytes in use; Linux lets that of a process be reset."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return 0  # a process keeps what it freed: what is in use cannot be told from what was


def peak_memory(device: torch.device) -> int:
    """Bytes at most in use since `reset_peak`: of the accelerator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM") or 0


def _status_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


class StepClock:
    """Seconds a step of a loop, between the first and the last one; the device is waited for at those two only."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.steps, self.done, self.first, self.last = device, steps, 0, 0.0, 0.0

    def __call__(self, done: int, steps: int) -> None:
        """Note a step."""
        self.done += 1
        if self.done in (1, self.steps):
            synchronise(self.device)
            moment = now()
            self.first, self.last = (moment, moment) if self.done == 1 else (self.first, moment)

    @property
    def seconds(self) -> float:
        """Of one step."""
        return (self.last - self.first) / (self.steps - 1)


# ------------------------------------------------------------------------------------------------------- one stage


@dataclass
class Bench:
    """What all variants share."""

    prior: Prior
    device: torch.device
    scale: float
    gflop_forward: float
    gflop_guided: float
    gflop_training: float
    work: UNet | None = None
    """The network that takes the weights of face after face, where code is compiled."""
    in_use: int = 0

    def begin(self) -> None:
        """Begin a stage: its peak of memory counts from here."""
        self.in_use = reset_peak(self.device)

    def peak(self) -> int:
        """Memory that the stage needed."""
        return max(0, peak_memory(self.device) - self.in_use)

    def shortened(self, steps: int) -> int:
        """How many of ``steps`` are run; at least 3, so that there are two to be timed."""
        return min(steps, max(3, round(self.scale * steps)))

    def step_seconds(self, steps: int, run: Callable[[StepClock, int], object]) -> tuple[float, float, int]:
        """Seconds a step, seconds of the call beyond its steps, and steps run."""
        number = self.shortened(steps)
        if steps < 2:
            return 0.0, 0.0, 0
        clock = StepClock(self.device, number)
        synchronise(self.device)
        start = now()
        run(clock, number)
        synchronise(self.device)
        return clock.seconds, max(0.0, now() - start - number * clock.seconds), number


def stages_of_ours(bench: Bench, settings: Settings, y: Tensor, face: int) -> list[Measured]:
    """Album, fine-tuning and restoration of one face with our code."""
    with computing(bench.prior.network, settings.precision, settings.compiled) as model:
        return stages_with(bench, model, settings, y, face)


def stages_with(bench: Bench, model: Model, settings: Settings, y: Tensor, face: int) -> list[Measured]:
    """The same, with a model that is ready to compute."""
    prior, device, unit = bench.prior, bench.device, f"face{face}"
    album, constrain, restoration = settings.album, settings.constrain, settings.restore
    noise_step = restoration.noise_step
    assert isinstance(noise_step, int)
    times = visited_times(album.noise_step, album.steps)
    guided = Guidance(y[None], album.guidance_interval, album.guidance_scale)
    guides = sum(guided.applies(t, s) for t, s in zip(times, [*times[1:], -1], strict=True))
    ys = y.expand(album.size, *y.shape)
    results = []

    def album_steps(guidance: Guidance | None) -> Callable[[StepClock, int], object]:
        def run(clock: StepClock, number: int) -> object:
            streams = [stream(settings.seed, unit, f"album:{i}") for i in range(album.size)]
            x_t = noise_to(ys, prior.schedule, album.noise_step, streams)
            taken = list(range(album.noise_step - 1, -1, -1))[:number]
            return denoise(model, x_t, prior.schedule, taken, streams, guidance=guidance, on_step=clock)

        return run

    bench.begin()
    plain_seconds, _, number = bench.step_seconds(len(times) - guides, album_steps(None))
    every_step = Guidance(ys, 1, album.guidance_scale)
    guided_seconds, _, guided_number = bench.step_seconds(max(guides, 3), album_steps(every_step))
    seconds = plain_seconds * (len(times) - guides) + guided_seconds * guides
    results.append(
        album_result(bench, settings.preset, face, seconds, len(times), guides, album.size, number + guided_number)
    )

    anchors = torch.rand(album.size, *y.shape, device=device) * 2 - 1
    bench.begin()

    def fine_tuning(clock: StepClock, number: int) -> object:
        return constrain_prior(
            prior,
            anchors,
            iterations=number,
            batch_size=constrain.batch_size,
            learning_rate=constrain.learning_rate,
            precision=settings.precision,
            compiled=settings.compiled,
            into=bench.work,
            parameters=constrain.parameters,
            seed=settings.seed,
            unit=unit,
            t_end=constrain.t_end(noise_step),
            on_step=clock,
        )

    seconds, once, number = bench.step_seconds(constrain.iterations, fine_tuning)
    results.append(
        training_result(bench, settings.preset, face, seconds, once, constrain.iterations, constrain.batch_size, number)
    )

    bench.begin()
    count = len(visited_times(noise_step, restoration.steps))

    def restoring(clock: StepClock, number: int) -> object:
        streams = [stream(settings.seed, unit, "restore")]
        return restore(model, y[None], prior.schedule, noise_step=number, generators=streams, on_step=clock)

    seconds, _, number = bench.step_seconds(count, restoring)
    results.append(restoration_result(bench, settings.preset, face, seconds * count, count, number))
    return results


def stages_of_reference(
    bench: Bench, network: reference.Network, diffusion: reference.Diffusion, paper: Settings, y: Tensor, face: int
) -> list[Measured]:
    """The same three stages, at the settings of ``paper``, by the reference."""
    device = bench.device
    album, constrain, restoration = paper.album, paper.constrain, paper.restore
    assert isinstance(restoration.noise_step, int)
    draws = torch.Generator(device).manual_seed(face)
    guides = album.noise_step // album.guidance_interval if album.guidance_interval else 0
    results = []

    def picture(interval: int) -> Callable[[StepClock, int], object]:
        return lambda clock, number: reference.denoised(
            network, diffusion, y[None], number, interval, album.guidance_scale, draws, clock
        )

    for weight in network.weights.values():  # the released code never freezes them
        weight.requires_grad_(True)
    bench.begin()
    plain, _, number = bench.step_seconds(album.noise_step - guides, picture(0))
    guided, _, guided_number = bench.step_seconds(max(guides, 3), picture(1))
    seconds = album.size * (plain * (album.noise_step - guides) + guided * guides)
    results.append(
        album_result(bench, REFERENCE, face, seconds, album.noise_step, guides, album.size, number + guided_number)
    )

    anchors = torch.rand(album.size, *y.shape, device=device) * 2 - 1
    bench.begin()
    seconds, once, number = bench.step_seconds(
        constrain.iterations,
        lambda clock, number: reference.fine_tuned(
            network,
            diffusion,
            anchors,
            iterations=number,
            batch_size=constrain.batch_size,
            learning_rate=constrain.learning_rate,
            draws=draws,
            on_step=clock,
        ),
    )
    results.append(
        training_result(bench, REFERENCE, face, seconds, once, constrain.iterations, constrain.batch_size, number)
    )
    bench.begin()
    seconds, _, number = bench.step_seconds(restoration.noise_step, picture(0))
    results.append(
        restoration_result(bench, REFERENCE, face, seconds * restoration.noise_step, restoration.noise_step, number)
    )
    return results


def album_result(
    bench: Bench, variant: str, face: int, seconds: float, steps: int, guides: int, size: int, measured: int
) -> Measured:
    """The album's row."""
    equivalents = size * (steps - guides + GUIDED * guides)
    gflop = size * ((steps - guides) * bench.gflop_forward + guides * bench.gflop_guided)
    peak = bench.peak()
    return Measured(variant, "album", face, seconds, equivalents, gflop, peak, measured, steps)


def training_result(
    bench: Bench, variant: str, face: int, step: float, once: float, iterations: int, batch: int, measured: int
) -> Measured:
    """The fine-tuning's row."""
    pictures = iterations * batch
    return Measured(
        variant,
        "fine-tuning",
        face,
        once + step * iterations,
        TRAINING * pictures,
        pictures * bench.gflop_training,
        bench.peak(),
        measured,
        iterations,
    )


def restoration_result(bench: Bench, variant: str, face: int, seconds: float, steps: int, measured: int) -> Measured:
    """The restoration's row."""
    peak = bench.peak()
    return Measured(variant, "restoration", face, seconds, steps, steps * bench.gflop_forward, peak, measured, steps)


def common_stages(bench: Bench, folder: Path, face: int) -> list[Measured]:
    """Input and output, and the metrics: the same for every variant, measured once a face."""
    from PIL import Image
    from skimage.data import astronaut

    card, results = bench.prior.card, []
    path = folder / "photo.png"
    Image.fromarray(astronaut()).save(path)
    bench.begin()
    start = now()
    photo = load_photo(path)
    alignment = align_face(load_detector("offline")(photo.rgb)[0].landmarks, card.image_size, card.crop_window)
    crop = crop_face(photo.rgb, alignment)
    pixels, _ = paste_face(photo, photo.pixels, crop, alignment)
    save_photo(photo, np.ascontiguousarray(pixels), folder / "restored.png")
    seconds = now() - start
    results.append(Measured("all", "input and output", face, seconds, 0, 0, bench.peak(), 1, 1))
    bench.begin()
    start = now()
    measure_faces(
        crop[None],
        input=(crop * 0.9)[None],
        which=("identity_input_dlib",),
        crop_window=card.crop_window,
        device=bench.device,
    )
    seconds = now() - start
    results.append(Measured("all", "metrics", face, seconds, 0, 0, bench.peak(), 1, 1))
    return results


# -------------------------------------------------------------------------------------------------- arithmetic done


def count_gflop(prior: Prior, device: torch.device) -> tuple[float, float, float]:
    """GFLOP of a forward pass, a guided step and a training step of one picture (a multiply-add counts as two)."""
    size = prior.card.image_size
    x, t = torch.zeros(1, 3, size, size, device=device), torch.tensor([100], device=device)

    def counted(work: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops() / 1e9

    def guided() -> None:
        state = x.clone().requires_grad_()
        prior.network(state, t).sum().backward()

    def training() -> None:
        prior.network.requires_grad_(True)
        denoising_loss(prior.network, x, t, torch.zeros_like(x), prior.schedule).total.mean().backward()
        prior.network.zero_grad()
        prior.network.requires_grad_(False)

    with torch.no_grad():
        forward = counted(lambda: prior.network(x, t))
    return forward, counted(guided), counted(training)


def roofline(device: torch.device) -> dict[str, float]:
    """The best GFLOP/s that a convolution of the network's kind and a matrix product reach here, by precision."""
    side, width = (2048, 256) if device.type == "cuda" else (1024, 128)
    best: dict[str, float] = {}
    with torch.no_grad():
        for precision in (torch.float32, torch.bfloat16):
            a = torch.randn(side, side, device=device, dtype=precision)
            candidates: dict[str, tuple[float, Callable[[], Tensor]]] = {}
            candidates["matmul"] = (2 * side**3 / 1e9, partial(torch.matmul, a, a))
            x = torch.randn(8, width, 32, 32, device=device, dtype=precision)
            w = torch.randn(width, width, 3, 3, device=device, dtype=precision)
            work = 2 * 8 * width * width * 9 * 32 * 32 / 1e9
            for layout in (torch.contiguous_format, torch.channels_last):
                xs, ws = x.to(memory_format=layout), w.to(memory_format=layout)
                name = "conv 3x3" + (", channels-last" if layout is torch.channels_last else "")
                candidates[name] = (work, partial(F.conv2d, xs, ws, padding=1))
            for name, (gflop, run) in candidates.items():
                fastest = float("inf")
                for _ in range(30):
                    synchronise(device)
                    start = now()
                    run()
                    synchronise(device)
                    fastest = min(fastest, now() - start)
                best[f"{name}, {str(precision).removeprefix('torch.')}"] = gflop / fastest
    return best


# ----------------------------------------------------------------------------------------------------- steady state


def steady_state(prior: Prior, device: torch.device, faces: int, compiled: bool) -> dict[str, Any]:
    """Time and memory of each of many faces in a row, with very short loops: does anything drift or recompile?"""
    settings = load_settings("fast", prior.card, {"compiled": compiled}).at_one_noise_step(prior.card)
    y = torch.rand(3, prior.card.image_size, prior.card.image_size, device=device) * 2 - 1
    bench = Bench(prior, device, 0.0, 0, 0, 0, copy.deepcopy(prior.network) if compiled else None)
    seconds, memory, graphs = [], [], []
    for face in range(faces):
        synchronise(device)
        start = now()
        stages_of_ours(bench, settings, y, face)
        synchronise(device)
        seconds.append(now() - start)
        allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")
        memory.append(allocated or 0)
        graphs.append(int(torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    tenth = max(2, faces // 5)
    early, late = seconds[1 : 1 + tenth], seconds[-tenth:]
    return {
        "faces": faces,
        "first_seconds": seconds[0],
        "median_seconds_early": statistics.median(early),
        "median_seconds_late": statistics.median(late),
        "late_against_early": statistics.median(late) / statistics.median(early),
        "memory_growth_bytes_a_face": (memory[-1] - memory[tenth]) / max(1, faces - 1 - tenth),
        "memory_bytes": memory[-1],
        "graphs_compiled_by_the_first_face": graphs[0],
        "graphs_compiled_after_it": graphs[-1] - graphs[0],
        "seconds": seconds,
    }


# -------------------------------------------------------------------------------------------------------- the report


def summary(rows: list[Measured], variants: list[str]) -> list[dict[str, Any]]:
    """Medians over the faces and of the ratios within a face, by variant and stage; the stage ``whole face`` added."""
    faces = sorted({row.face for row in rows})
    table = {(row.variant, row.stage, row.face): row for row in rows}

    def cell(variant: str, stage: str, face: int) -> Measured:
        return table.get((variant, stage, face)) or table["all", stage, face]

    result = []
    for stage in (*STAGES, "whole face"):
        parts = STAGES if stage == "whole face" else (stage,)
        for variant in variants:
            cells = [[cell(variant, part, face) for part in parts] for face in faces]
            seconds = [sum(c.seconds for c in of_face) for of_face in cells]
            base = [sum(cell(REFERENCE, part, face).seconds for part in parts) for face in faces]
            gflop = sum(c.gflop for c in cells[0])
            result.append(
                {
                    "stage": stage,
                    "variant": variant,
                    "seconds": statistics.median(seconds),
                    "seconds_min": min(seconds),
                    "seconds_max": max(seconds),
                    "ratio": statistics.median(b / s for b, s in zip(base, seconds, strict=True)),
                    "forward_equivalents": sum(c.forward_equivalents for c in cells[0]),
                    "gflop_per_second": gflop / statistics.median(seconds),
                    "peak_memory_bytes": statistics.median(
                        max(c.peak_memory_bytes for c in of_face) for of_face in cells
                    ),
                    "measured_steps": sum(c.measured_steps for c in cells[0]),
                    "all_steps": sum(c.all_steps for c in cells[0]),
                }
            )
    return result


def markdown(facts: dict[str, Any], table: list[dict[str, Any]]) -> str:
    """The tables for docs/performance.md."""
    lines = [f"{facts['machine']}; {facts['threads']} threads; prior {facts['prior']} ({facts['image_size']} px), "]
    lines[0] += f"{facts['gflop_forward']:.2f} GFLOP a forward pass; medians of {facts['faces']} faces."
    if facts["clock"] == "processor":
        lines.append("Seconds are of processor time, which other processes do not take.")
    if facts["compiled"]:
        lines.append(
            f"Compiled; the face that was not counted took {facts['first_seconds']:,.0f} s, most of it for that."
        )
    if any(row["measured_steps"] < row["all_steps"] for row in table):
        lines.append("Loops are extrapolated from the steps that were measured.")
    lines += [
        "",
        "| stage | variant | seconds (range) | times faster | forward equivalents | GFLOP/s | peak memory | steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        common = row["stage"] in ("input and output", "metrics")
        if common and row["variant"] != REFERENCE:
            continue
        rate = f"{row['gflop_per_second']:.0f}" if row["forward_equivalents"] else ""
        digits = 1 if row["seconds"] > 1 else 3
        seconds = " to ".join(f"{row[name]:,.{digits}f}" for name in ("seconds_min", "seconds_max"))
        seconds = f"{row['seconds']:,.{digits}f} ({seconds})"
        lines.append(
            f"| {row['stage']} | {'all' if common else row['variant']} | {seconds} | "
            f"{'' if common else format(row['ratio'], '.2f')} | {row['forward_equivalents']:,.0f} | {rate} | "
            f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB | {row['measured_steps']} of {row['all_steps']:,} |"
        )
    lines += ["", "| the most this machine reaches | GFLOP/s |", "|---|---|"]
    lines += [f"| {name} | {rate:,.0f} |" for name, rate in facts["roofline"].items()]
    return "\n".join(lines) + "\n"


def load_network(name: str, device: torch.device) -> Prior:
    """A prior by name, or ``random256``; in the layout in which the pipeline keeps it."""
    if name != "random256":
        prior = Prior.load(name, device)
    else:
        config = UNetConfig()
        torch.manual_seed(0)
        card = Card(name=name, architecture=config, sha256="", licence="none", source="random weights, for timing")
        prior = Prior.from_state_dict(UNet(config).state_dict(), card, device)
    prior.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return prior


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prior", default="faces64", help="a prior, or random256")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--faces", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="share of each loop that is run")
    parser.add_argument("--processor-time", action="store_true", help="for a busy machine; with --threads 1 only")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--compiled", action="store_true", help="our presets with compiled=true")
    parser.add_argument("--steady", type=int, metavar="FACES", help="only: is the time of many faces the same?")
    parser.add_argument("--out", type=Path, default=Path("results/speed"))
    arguments = parser.parse_args()

    if arguments.processor_time:
        if arguments.threads != 1 or arguments.device != "cpu":
            parser.error("--processor-time counts the work of all threads: use it with --threads 1 on a CPU.")
        global now
        now = time.process_time
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():  # `tasks.device` knows it too, but would load Prefect
        parser.error(f"--device {arguments.device}: no CUDA device is there.")
    if arguments.compiled:
        check_compiler(device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    prior = load_network(arguments.prior, device)
    gflop = count_gflop(prior, device)
    if arguments.steady:
        steady = steady_state(prior, device, arguments.steady, arguments.compiled)
        (arguments.out / "steady.json").write_text(json.dumps(steady, indent=1) + "\n")
        print(json.dumps({name: value for name, value in steady.items() if name != "seconds"}, indent=1))
        return

    changes = {"compiled": arguments.compiled}
    names = dict.fromkeys(["paper", *arguments.presets])
    settings = {name: load_settings(name, prior.card, changes).at_one_noise_step(prior.card) for name in names}
    work = copy.deepcopy(prior.network) if arguments.compiled else None
    bench = Bench(prior, device, arguments.scale, *gflop, work)
    plain = reference.Network(prior.network.state_dict(), prior.card.architecture)
    diffusion = reference.Diffusion(prior.schedule.betas)
    facts: dict[str, Any] = {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "device": device.type,
        "threads": arguments.threads,
        "clock": "processor" if arguments.processor_time else "wall",
        "torch": torch.__version__,
        "prior": prior.card.name,
        "image_size": prior.card.image_size,
        "faces": arguments.faces,
        "scale": arguments.scale,
        "compiled": arguments.compiled,
        "gflop_forward": gflop[0],
        "gflop_guided": gflop[1],
        "gflop_training": gflop[2],
        "presets": {name: settings[name].model_dump() for name in arguments.presets},
    }
    roof: dict[str, float] = {}
    variants = [REFERENCE, *arguments.presets]
    rows: list[Measured] = []
    for face in range(-1, arguments.faces):  # face -1 warms up
        begun = time.perf_counter()
        generator = torch.Generator().manual_seed(face + 1)
        y = (torch.rand(3, prior.card.image_size, prior.card.image_size, generator=generator) * 2 - 1).to(device)
        measured = common_stages(bench, arguments.out, face)
        turn = max(face, 0) % len(variants)
        for variant in variants[turn:] + variants[:turn]:
            if variant == REFERENCE:
                measured += stages_of_reference(bench, plain, diffusion, settings["paper"], y, face)
            else:
                measured += stages_of_ours(bench, settings[variant], y, face)
        for name, rate in roofline(device).items():  # anew with every face: the machine is not always free
            roof[name] = max(rate, roof.get(name, 0.0))
        if face < 0:
            facts["first_seconds"] = time.perf_counter() - begun
        else:
            rows += measured
            print(f"face {face + 1} of {arguments.faces}", flush=True)
    for name in ("photo.png", "restored.png"):
        (arguments.out / name).unlink(missing_ok=True)
    facts["roofline"] = roof
    table = summary(rows, variants)
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows]), arguments.out / "stages.parquet")
    (arguments.out / "speed.json").write_text(json.dumps({**facts, "table": table}, indent=1) + "\n")
    text = markdown(facts, table)
    (arguments.out / "speed.md").write_text(text)
    print(text)


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


if __name__ == "__main__":
    main()
