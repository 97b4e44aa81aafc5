"""Constrain the prior to every face of a chunk: fine-tune it on the face's album."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rgcp_core.constrain import constrain_prior
from rgcp_core.images import load_image
from rgcp_core.leave_out import personal_noise_step
from rgcp_core.people import load_person
from rgcp_core.prior import Prior
from rgcp_core.theory import noise_step_for
from tasks.album import album_files
from tasks.device import for_each_face, peak_memory_bytes
from tasks.events import tell
from tasks.job import Job
from tasks.keys import constrain_key, restored_already
from tasks.recognise import loaded_personal
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
    outputs = [path] if face.person is None else []
    if record.done("constrain", key, outputs) or restored_already(job, prior, face, record):
        return
    if face.person is not None:
        note_personal(job, prior, face, record, key)
        return
    start = time.perf_counter()
    settings = job.settings.constrain
    y = load_image(record.folder / "input.png")
    anchors = torch.stack([load_image(picture) for picture in album_files(job, face.unit)])
    noise_step = noise_step_for(job.settings.restore.noise_step, y, anchors, prior.schedule.alphas_cumprod)
    constrained = constrain_prior(
        prior,
        anchors,
        **settings.arguments(),
        t_end=noise_step if settings.times == "below_noise_step" else None,
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
        noise_step=noise_step,
        loss_start=constrained.loss_start,
        loss_end=constrained.loss_end,
        peak_memory_bytes=peak_memory_bytes(next(prior.network.parameters()).device),
    )


def note_personal(job: Job, prior: Prior, face: FaceFound, record: UnitRecord, key: str) -> None:
    """The fine-tuning was done when the person was made known: note its facts."""
    assert job.people is not None
    assert face.person is not None
    card = load_person(job.people, face.person).card
    record.finish(
        "constrain",
        key,
        seconds=0.0,
        noise_step=personal_noise_step(job.settings, prior),
        loss_start=card.loss_start,
        loss_end=card.loss_end,
        iterations=card.settings["iterations"],
        album_size=len(card.album),
    )


def constrained_for(job: Job, prior: Prior, face: FaceFound) -> Prior:
    """The prior that restores a face: its own constrained one, or that of the person it shows."""
    if face.person is None or face.person_sha256 is None:
        return read_weights(prior, job.weights_file(face.unit))
    assert job.people is not None
    return loaded_personal(job.people, face.person, face.person_sha256, prior)


def write_weights(prior: Prior, path: Path) -> None:
    """Write a constrained prior's weights, float32, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(
            {name: value.contiguous().cpu() for name, value in prior.network.state_dict().items()}, temporary
        )
    except SafetensorError as error:  # a full disk: it is not the face's fault
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from error
    temporary.replace(path)


def read_weights(prior: Prior, path: Path) -> Prior:
    """The prior that `write_weights` wrote, on the device and with the card of ``prior``."""
    device = next(prior.network.parameters()).device
    constrained = Prior.from_state_dict(load_file(path), prior.card, device)
    constrained.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return constrained
