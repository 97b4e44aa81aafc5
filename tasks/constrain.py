"""Constrain the prior to every face of a chunk: fine-tune it on the face's album."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from safetensors.torch import load_file, save_file

from rgcp_core.constrain import constrain_prior
from rgcp_core.images import load_image
from rgcp_core.prior import Prior
from tasks.album import album_files
from tasks.device import for_each_face, peak_memory_bytes
from tasks.events import tell
from tasks.job import Job
from tasks.keys import constrain_key, restored_already, training_end
from tasks.units import FaceFound, Failure, PhotoFound, UnitRecord


@task(cache_policy=NO_CACHE)
def constrain(job: Job, found: Sequence[PhotoFound], failures: dict[str, Failure]) -> dict[str, Failure]:
    """Write the constrained weights of every face; return the failures so far and the new ones."""
    if job.stub:
        return dict(failures)
    return for_each_face(fine_tune, job, found, failures)


def fine_tune(job: Job, prior: Prior, face: FaceFound) -> None:
    """Fine-tune for one face, unless that is done or the restoration that needs it is."""
    record = UnitRecord.load(job.unit_dir(face.unit))
    key, path = constrain_key(job, prior, face), job.weights_file(face.unit)
    if record.done("constrain", key, [path]) or restored_already(job, prior, face, record):
        return
    start = time.perf_counter()
    settings = job.settings.constrain
    anchors = torch.stack([load_image(picture) for picture in album_files(job, face.unit)])
    constrained = constrain_prior(
        prior,
        anchors,
        iterations=settings.iterations,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        learning_rate_decay=settings.learning_rate_decay,
        t_end=training_end(job),
        precision=job.settings.precision,
        seed=job.settings.seed,
        unit=face.unit,
        on_step=lambda done, steps: tell(face.unit, "constrain", done / steps),
    )
    write_weights(constrained.prior, path)
    record.finish(
        "constrain",
        key,
        seconds=time.perf_counter() - start,
        loss_start=constrained.loss_start,
        loss_end=constrained.loss_end,
        peak_memory_bytes=peak_memory_bytes(next(prior.network.parameters()).device),
    )


def write_weights(prior: Prior, path: Path) -> None:
    """Write a constrained prior's weights, float32, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file(
        {name: value.contiguous().cpu() for name, value in prior.network.state_dict().items()}, temporary
    )
    temporary.replace(path)


def read_weights(prior: Prior, path: Path) -> Prior:
    """The prior that `write_weights` wrote, on the device and with the card of ``prior``."""
    device = next(prior.network.parameters()).device
    constrained = Prior.from_state_dict(load_file(path), prior.card, device)
    constrained.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return constrained
