"""What a run would do, how long it would take and how much it would write, without doing it."""

import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from flows.archive import finished_chunk, prepare
from flows.inputs import chunks, default_chunk, expand, photo_names
from rgcp_core.compute import computing
from rgcp_core.constrain import constrain_prior
from rgcp_core.errors import UnitError
from rgcp_core.faces.detect import gate_faces, load_detector
from rgcp_core.images import load_photo
from rgcp_core.manifest import MANIFEST, read_table
from rgcp_core.prior import WEIGHTS_FILE, Card, find_prior
from rgcp_core.randomness import stream
from rgcp_core.sampling import Progress, generate_album, restore
from rgcp_core.schedule import visited_times
from tasks.align import boxes_of
from tasks.device import loaded_prior, pick_device, work_network
from tasks.job import Job

SAMPLE = 8  # photos in which faces are counted
PNG_BYTES_A_PIXEL = 1.6  # of faces at 64 to 128 px, measured
DELTA_SHARE = 0.45  # of the prior's own file, which has two bytes a weight: measured
SHOWN = 5
TIMED = 3  # steps of each stage that are timed, from the first to the last
STAGES = ("seconds_align", "seconds_album", "seconds_constrain", "seconds_restore", "seconds_paste")


class PlannedChunk(NamedTuple):
    """One chunk: its key, whether it is done, and its photos."""

    key: str
    done: bool
    photos: list[str]
    bytes: int


@dataclass(frozen=True)
class Cost:
    """What a photo costs on this device, and how that is known."""

    seconds_a_photo: float
    seconds_a_face: float
    faces_a_photo: float
    basis: str


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    photos: int
    photos_done: int
    chunks: int
    bytes_in: int
    """Of the photos that are still to do."""
    faces: float
    """Expected, in the photos still to do."""
    hours: float
    bytes_out: float
    cost: Cost


def plan_archive(paths: list[str], out: Path, console: Console, chunk: int | None = None, **options: Any) -> Plan:
    """Show what `flows.run.run_archive` would do with the same arguments; the list of chunks goes to stdout.

    Nothing is written. Photos are streamed: memory does not grow with their number, but for the names of one folder.
    """
    job, card = prepare(paths, str(out), **options, create=False)
    inputs = expand(paths)
    short = sys.stdout.isatty()
    photos = photos_done = number = bytes_in = 0
    sample: list[str] = []
    draw = random.Random(0)
    for planned in planned_chunks(job, card, inputs, chunk or default_chunk(job)):
        number += 1
        photos += len(planned.photos)
        if planned.done:
            photos_done += len(planned.photos)
        else:
            bytes_in += planned.bytes
            for name in planned.photos:  # a sample of the stream, each photo with the same chance
                if len(sample) < SAMPLE:
                    sample.append(name)
                elif (place := draw.randrange(photos - photos_done)) < SAMPLE:
                    sample[place] = name
        if not short or number <= SHOWN:
            name = os.fsencode(planned.photos[0]).decode("utf-8", "backslashreplace")
            print(planned.key, "done" if planned.done else "to do", len(planned.photos), name, sep="\t")
    if short and number > SHOWN:
        print(f"... and {number - SHOWN} more chunks; redirect the output to have them all")
    to_do = photos - photos_done
    cost = estimate(job, card, sample) if to_do else Cost(0, 0, 0, "nothing to do")
    faces = to_do * cost.faces_a_photo
    plan = Plan(
        photos=photos,
        photos_done=photos_done,
        chunks=number,
        bytes_in=bytes_in,
        faces=faces,
        hours=(to_do * cost.seconds_a_photo + faces * cost.seconds_a_face) / 3600,
        bytes_out=bytes_in * min(1.0, cost.faces_a_photo) + faces * bytes_a_face(job, card),
        cost=cost,
    )
    show(plan, console)
    return plan


def planned_chunks(job: Job, card: Card, inputs: list[Path], size: int) -> Iterator[PlannedChunk]:
    """The chunks of a run, in order."""
    for each in chunks(job, card, photo_names(job.base, inputs), size):
        yield PlannedChunk(each.key, finished_chunk(job, each) is not None, each.photos, each.bytes)


def estimate(job: Job, card: Card, sample: list[str]) -> Cost:
    """Seconds and faces a photo: from the manifest of an earlier run into the folder, else measured on a few photos."""
    if (job.out / MANIFEST).is_file() and not job.stub:
        rows = read_table(job.out, ["photo", "status", "settings_sha256", "prior_sha256", *STAGES]).to_pandas()
        same = (rows.settings_sha256 == job.settings.digest()) & (rows.prior_sha256 == card.sha256)
        restored = rows[same & (rows.status == "restored")]
        if len(restored) >= SAMPLE:
            share = len(restored) / rows[same].photo.nunique()
            seconds = float(restored[list(STAGES)].fillna(0).sum(axis=1).mean())
            return Cost(0.0, seconds, share, f"mean of the {len(restored)} faces restored here so far")
    faces, seconds_a_photo = 1.0, 0.0
    basis = "one face a crop"
    if job.framing == "photos":
        faces, seconds_a_photo = faces_in(job, card, sample)
        basis = f"faces counted in {len(sample)} photos drawn at random"
    elif job.framing == "boxes":
        faces, basis = sum(len(boxes_of(job, name)) for name in sample) / len(sample), "the table of boxes"
    if job.stub:
        return Cost(seconds_a_photo, 0.0, faces, basis)
    return Cost(seconds_a_photo, measured_seconds(job), faces, f"{basis}, a few steps timed on this device")


def faces_in(job: Job, card: Card, sample: list[str]) -> tuple[float, float]:
    """Faces that would be restored, and seconds to find them, a photo."""
    detector = load_detector(job.settings.faces.detector)
    settings, found, start = job.settings.faces, 0, time.perf_counter()
    for name in sample:
        try:
            photo = load_photo(job.base / name)
        except (UnitError, OSError):
            continue
        gated = gate_faces(
            detector(photo.rgb),
            photo.size,
            crop_window=card.crop_window,
            min_score=settings.min_score,
            min_size=settings.min_size,
            prior_size=card.image_size,
            max_scale=settings.max_enlargement,
        )
        found += sum(reason is None for _, reason in gated)
    return found / len(sample), (time.perf_counter() - start) / len(sample)


def measured_seconds(job: Job) -> float:
    """Seconds for one face on this device: a step of each stage, times their number."""
    prior = loaded_prior(job.prior, pick_device(job.device))
    device = next(prior.network.parameters()).device
    settings, schedule = job.settings, prior.schedule
    y = torch.zeros(3, prior.card.image_size, prior.card.image_size, device=device)
    wanted = settings.restore.noise_step
    largest = prior.card.usual_noise_step if wanted == "auto" else wanted
    album = settings.album
    guided = 0 if album.guidance_interval == 0 else album.noise_step // album.guidance_interval

    def album_steps(interval: int, on_step: Progress) -> None:
        streams = [stream(0, "plan", str(i)) for i in range(album.size)]
        with computing(prior.network, settings.precision, settings.compiled) as model:
            generate_album(
                model, y, schedule, noise_step=album.noise_step, steps=TIMED, guidance_interval=interval,
                guidance_scale=0.0, generators=streams, on_step=on_step,
            )  # fmt: skip

    def constrain_steps(on_step: Progress) -> None:
        values = settings.constrain
        constrain_prior(
            prior, y[None], iterations=TIMED, batch_size=values.batch_size, learning_rate=values.learning_rate, seed=0,
            unit="plan", t_end=values.t_end(largest), parameters=values.parameters, precision=settings.precision,
            compiled=settings.compiled, into=work_network(job, prior), on_step=on_step,
        )  # fmt: skip

    def restore_steps(on_step: Progress) -> None:
        streams = [stream(0, "plan", "y")]
        with computing(prior.network, settings.precision, settings.compiled) as model:
            restore(model, y[None], schedule, noise_step=largest, steps=TIMED, generators=streams, on_step=on_step)

    def number(noise_step: int, steps: int | None) -> int:
        return len(visited_times(noise_step, steps))

    album_number = number(album.noise_step, album.steps)
    guided = min(guided, album_number)
    seconds = (album_number - guided) * step_seconds(partial(album_steps, 0), device)
    seconds += guided * step_seconds(partial(album_steps, 1), device) if guided else 0.0
    seconds += settings.constrain.iterations * step_seconds(constrain_steps, device)
    return seconds + number(largest, settings.restore.steps) * step_seconds(restore_steps, device)


def step_seconds(loop: Callable[[Progress], None], device: torch.device) -> float:
    """Seconds a step of a loop, from its first step to its last, when it has been run once before."""
    moments: list[float] = []

    def on_step(done: int, steps: int) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        moments.append(time.perf_counter())

    for _ in range(2):
        moments.clear()
        loop(on_step)
    return (moments[-1] - moments[0]) / (TIMED - 1)


def bytes_a_face(job: Job, card: Card) -> float:
    """Bytes that stay on disk for one face: its pictures, its record and its row."""
    pictures = 3 + (job.settings.album.size if job.keep != "none" else 0)
    kept = pictures * card.image_size**2 * PNG_BYTES_A_PIXEL + 3_000
    if job.keep == "all":
        kept += DELTA_SHARE * (find_prior(job.prior) / WEIGHTS_FILE).stat().st_size
    return kept


def show(plan: Plan, console: Console) -> None:
    """The plan as a table."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("photos", f"{plan.photos:,}")
    if plan.photos_done:
        table.add_row("done already", f"{plan.photos_done:,}")
    table.add_row("chunks", f"{plan.chunks:,}")
    table.add_row("to read", f"{plan.bytes_in / 1e9:,.2f} GB")
    table.add_row("faces, about", f"{plan.faces:,.0f}")
    table.add_row("time, about", duration(plan.hours))
    table.add_row("to write, about", f"{plan.bytes_out / 1e9:,.2f} GB")
    console.print(table)
    console.print(f"Estimated from: {plan.cost.basis}.", soft_wrap=True)


def duration(hours: float) -> str:
    """A time that a person can grasp."""
    if hours < 1:
        return f"{max(1, round(60 * hours))} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
