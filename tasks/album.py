"""Draw the generative album of every face of a chunk."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from rgcp_core.images import load_image, save_image
from rgcp_core.precision import at_precision
from rgcp_core.prior import Prior
from rgcp_core.randomness import stream
from rgcp_core.sampling import generate_album
from tasks.device import for_each_face, in_fitting_batches, peak_memory_bytes
from tasks.events import tell
from tasks.job import Job
from tasks.keys import album_key, restored_already
from tasks.units import FaceFound, Failure, PhotoFound, UnitRecord


@task(cache_policy=NO_CACHE)
def album(job: Job, found: Sequence[PhotoFound], failures: dict[str, Failure]) -> dict[str, Failure]:
    """Write ``album/NN.png`` of every face; return the failures so far and the new ones."""
    if job.stub:
        return dict(failures)
    return for_each_face(draw_album, job, found, failures)


def album_files(job: Job, unit: str) -> list[Path]:
    """Where the pictures of a face's album are."""
    return [job.unit_dir(unit) / "album" / f"{i:02d}.png" for i in range(job.settings.album.size)]


def draw_album(job: Job, prior: Prior, face: FaceFound) -> None:
    """Draw one album, unless it is there under its key or the restoration that needs it is done."""
    record = UnitRecord.load(job.unit_dir(face.unit))
    if face.person is not None:  # the personal album takes its place
        drop_album(record.folder)
        return
    key, files = album_key(job, prior, face), album_files(job, face.unit)
    if record.done("album", key, files) or restored_already(job, prior, face, record):
        return
    start = time.perf_counter()
    settings = job.settings.album
    device = next(prior.network.parameters()).device
    y = load_image(record.folder / "input.png").to(device)
    model = at_precision(prior.network, job.settings.precision)

    def draw(first: int, end: int) -> Tensor:
        return generate_album(
            model,
            y,
            prior.schedule,
            **settings.arguments(),
            generators=[stream(job.settings.seed, face.unit, f"album:{i}") for i in range(first, end)],
            on_step=lambda done, steps: tell(
                face.unit, "album", (first + (end - first) * done / steps) / settings.size
            ),
        ).cpu()

    pictures = in_fitting_batches(draw, settings.size, device)
    for path, picture in zip(files, pictures, strict=True):
        save_image(picture, path)
    spread = album_variance(pictures).sqrt()
    save_image(spread_picture(spread), record.folder / "variance.png")
    record.finish(
        "album",
        key,
        seconds=time.perf_counter() - start,
        spread=float(spread.mean()),
        peak_memory_bytes=peak_memory_bytes(device),
    )


def drop_album(folder: Path) -> None:
    """Remove a face's generative album and what was drawn from it."""
    shutil.rmtree(folder / "album", ignore_errors=True)
    (folder / "variance.png").unlink(missing_ok=True)


def album_variance(pictures: Tensor) -> Tensor:
    """Variance (H,W) of an album (N,3,H,W) over its pictures, averaged over the colours."""
    if len(pictures) < 2:
        return torch.zeros(pictures.shape[-2:])
    return pictures.var(dim=0, unbiased=True).mean(dim=0)


def spread_picture(spread: Tensor) -> Tensor:
    """The album's standard deviation (H,W) as a picture (3,H,W): black 0, white 0.5 of the range [-1,1] and more."""
    return (spread / 0.5).clamp(0, 1).mul(2).sub(1).expand(3, -1, -1)
