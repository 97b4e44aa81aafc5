"""Constrain the prior to every face of a chunk: fine-tune it on the face's album."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rgcp_core.constrain import Constrained, can_share, constrain_prior, constrain_together, draft_of
from rgcp_core.images import load_image
from rgcp_core.people import load_person
from rgcp_core.prior import Prior
from rgcp_core.unet import UNet
from tasks.album import album_files
from tasks.device import for_each_face, gains_by_sharing, in_groups, peak_memory_bytes, work_network
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
    return for_each_face(fine_tune, job, found, failures, together=fine_tune_together)


def fine_tune(job: Job, prior: Prior, face: FaceFound) -> None:
    """Fine-tune for one face, unless that is done or the restoration that needs it is."""
    record = UnitRecord.load(job.unit_dir(face.unit))
    if is_constrained(job, prior, face, record):
        return
    if face.person is not None:
        note_personal(job, prior, face, record, constrain_key(job, prior, face))
        return
    start = time.perf_counter()
    y, anchors, noise_step = inputs(job, prior, face, record)
    constrained = constrain_prior(
        prior,
        anchors,
        **job.settings.constrain.arguments(),
        t_end=job.settings.constrain.t_end(noise_step),
        precision=job.settings.precision,
        compiled=job.settings.compiled,
        into=work_network(job, prior),
        seed=job.settings.seed,
        unit=face.unit,
        draft=draft_of(y, prior.schedule, noise_step, job.settings.seed, face.unit),
        on_step=lambda done, steps: tell(face.unit, "constrain", done / steps),
    )
    finish(job, prior, face, record, constrained, noise_step, time.perf_counter() - start)


def fine_tune_together(job: Job, prior: Prior, faces: Sequence[FaceFound]) -> None:
    """Fine-tune for several faces at a time, where they can share a step; what is left, `fine_tune` does alone."""
    settings = job.settings.constrain
    stops_early = settings.patience is not None or settings.settled is not None  # each face at a step of its own
    gains = gains_by_sharing(next(prior.network.parameters()).device)
    if not (gains and can_share(prior, settings.parameters)) or stops_early:
        return
    records = {face.unit: UnitRecord.load(job.unit_dir(face.unit)) for face in faces if face.person is None}

    def fine_tune_group(group: Sequence[FaceFound]) -> None:
        start = time.perf_counter()
        prepared = [inputs(job, prior, face, records[face.unit]) for face in group]
        made = constrain_together(
            prior,
            [anchors for _, anchors, _ in prepared],
            iterations=settings.iterations,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            learning_rate_decay=settings.learning_rate_decay,
            parameters=settings.parameters,
            precision=job.settings.precision,
            seed=job.settings.seed,
            units=[face.unit for face in group],
            t_ends=[settings.t_end(noise_step) for _, _, noise_step in prepared],
            on_step=partial(tell_all, group),
        )
        seconds = (time.perf_counter() - start) / len(group)
        for face, constrained, (_, _, noise_step) in zip(group, made, prepared, strict=True):
            finish(job, prior, face, records[face.unit], constrained, noise_step, seconds)

    own = [face for face in faces if face.person is None]
    in_groups([face for face in own if not is_constrained(job, prior, face, records[face.unit])], fine_tune_group)


def tell_all(faces: Sequence[FaceFound], done: int, steps: int) -> None:
    """Report the same progress for each face."""
    for face in faces:
        tell(face.unit, "constrain", done / steps)


def is_constrained(job: Job, prior: Prior, face: FaceFound, record: UnitRecord) -> bool:
    """Whether nothing is left to do here: the constrained prior is there, or the picture that needed it."""
    outputs = [job.weights_file(face.unit)] if face.person is None else []
    key = constrain_key(job, prior, face)
    return record.done("constrain", key, outputs) or restored_already(job, prior, face, record)


def inputs(job: Job, prior: Prior, face: FaceFound, record: UnitRecord) -> tuple[Tensor, Tensor, int]:
    """The damaged face (3,H,W) on the prior's device, its album (N,3,H,W) and the K it is restored from."""
    y = load_image(record.folder / "input.png")
    anchors = torch.stack([load_image(picture) for picture in album_files(job, face.unit)])
    noise_step = prior.noise_step_for(job.settings.restore.noise_step, y)
    return y.to(next(prior.network.parameters()).device), anchors, noise_step


def finish(
    job: Job,
    prior: Prior,
    face: FaceFound,
    record: UnitRecord,
    constrained: Constrained,
    noise_step: int,
    seconds: float,
) -> None:
    """Write the constrained weights and note that the stage is done."""
    write_weights(constrained.prior, job.weights_file(face.unit))
    record.finish(
        "constrain",
        constrain_key(job, prior, face),
        seconds=seconds,
        noise_step=noise_step,
        iterations=len(constrained.losses),
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
        noise_step=prior.noise_step_for(job.settings.restore.noise_step, load_image(record.folder / "input.png")),
        loss_start=card.loss_start,
        loss_end=card.loss_end,
        iterations=card.settings["iterations"],
        album_size=len(card.album),
    )


def constrained_for(job: Job, prior: Prior, face: FaceFound) -> Prior:
    """The prior that restores a face: its own constrained one, valid until the next, or that of the person it shows."""
    if face.person is None or face.person_sha256 is None:
        return read_weights(prior, job.weights_file(face.unit), work_network(job, prior))
    assert job.people is not None
    return loaded_personal(job.people, face.person, face.person_sha256, prior)


def write_weights(prior: Prior, path: Path) -> None:
    """Write a constrained prior's weights, float32, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({name: value.contiguous().cpu() for name, value in prior.network.state_dict().items()}, temporary)
    except SafetensorError as error:  # a full disk: it is not the face's fault
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from error
    temporary.replace(path)


def read_weights(prior: Prior, path: Path, into: UNet | None = None) -> Prior:
    """The prior that `write_weights` wrote, on the device and with the card of ``prior``; its network is ``into``."""
    if into is None:
        constrained = Prior.from_state_dict(load_file(path), prior.card, next(prior.network.parameters()).device)
    else:
        into.load_state_dict(load_file(path))  # in place
        constrained = replace(prior, network=into.eval().requires_grad_(False))
    constrained.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return constrained
