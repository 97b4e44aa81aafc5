"""Draw the generative album of every face of a chunk."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from rgcp_core.compute import computing
from rgcp_core.images import load_image, save_image
from rgcp_core.prior import Prior
from rgcp_core.randomness import stream
from rgcp_core.sampling import generate_album
from tasks.device import for_each_face, gains_by_sharing, in_fitting_batches, in_groups, peak_memory_bytes
from tasks.events import tell
from tasks.job import Job
from tasks.keys import album_key, restored_already
from tasks.units import FaceFound, Failure, PhotoFound, UnitRecord


@task(cache_policy=NO_CACHE)
def album(job: Job, found: Sequence[PhotoFound], failures: dict[str, Failure]) -> dict[str, Failure]:
    """Write ``album/NN.png`` of every face; return the failures so far and the new ones."""
    if job.stub:
        return dict(failures)
    return for_each_face(draw_album, job, found, failures, together=draw_albums_together)


def album_files(job: Job, unit: str) -> list[Path]:
    """Where the pictures of a face's album are."""
    return [job.unit_dir(unit) / "album" / f"{i:02d}.png" for i in range(job.settings.album.size)]


def draw_album(job: Job, prior: Prior, face: FaceFound) -> None:
    """Draw one album, unless it is there under its key or the restoration that needs it is done."""
    if face.person is not None:  # the personal album takes its place
        drop_album(job.unit_dir(face.unit))
    elif is_wanted(job, prior, face):
        draw_albums(job, prior, [face])


def draw_albums_together(job: Job, prior: Prior, faces: Sequence[FaceFound]) -> None:
    """Draw the albums of several faces in one batch, where that is faster; what is left, `draw_album` does alone."""
    if gains_by_sharing(next(prior.network.parameters()).device):
        waiting = [face for face in faces if face.person is None and is_wanted(job, prior, face)]
        in_groups(waiting, lambda group: draw_albums(job, prior, group), whole_only=job.settings.compiled)


def is_wanted(job: Job, prior: Prior, face: FaceFound) -> bool:
    """Whether the face's album is neither there nor past its use."""
    record = UnitRecord.load(job.unit_dir(face.unit))
    done = record.done("album", album_key(job, prior, face), album_files(job, face.unit))
    return not (done or restored_already(job, prior, face, record))


def draw_albums(job: Job, prior: Prior, faces: Sequence[FaceFound]) -> None:
    """Draw the albums of these faces in one batch, or in smaller ones where memory is short."""
    start = time.perf_counter()
    settings, size = job.settings, job.settings.album.size
    device = next(prior.network.parameters()).device
    records = [UnitRecord.load(job.unit_dir(face.unit)) for face in faces]
    ys = torch.stack([load_image(record.folder / "input.png") for record in records]).to(device)
    ys = ys.repeat_interleave(size, dim=0)
    purposes = [(face.unit, f"album:{i}") for face in faces for i in range(size)]

    def draw(first: int, end: int) -> Tensor:
        def on_step(done: int, steps: int) -> None:
            for face in faces:
                tell(face.unit, "album", (first + (end - first) * done / steps) / len(purposes))

        with computing(prior.network, settings.precision, settings.compiled) as model:
            return generate_album(
                model,
                ys[first:end],
                prior.schedule,
                **settings.album.arguments(),
                generators=[stream(settings.seed, *purpose) for purpose in purposes[first:end]],
                on_step=on_step,
            ).cpu()

    pictures = in_fitting_batches(draw, len(purposes))
    seconds = (time.perf_counter() - start) / len(faces)
    for face, record, of_face in zip(faces, records, pictures.split(size), strict=True):
        for path, picture in zip(album_files(job, face.unit), of_face, strict=True):
            save_image(picture, path)
        spread = album_variance(of_face).sqrt()
        save_image(spread_picture(spread), record.folder / "variance.png")
        record.finish(
            "album",
            album_key(job, prior, face),
            seconds=seconds,
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
