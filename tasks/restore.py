"""Restore every face of a chunk with its constrained prior."""

import shutil
import time
from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from rgcp_core.compute import computing
from rgcp_core.delta import write_delta
from rgcp_core.images import load_image, save_image, write_atomically
from rgcp_core.prior import Prior
from rgcp_core.randomness import stream
from rgcp_core.sampling import restore as restore_pictures
from rgcp_core.tone import keep_tone
from tasks.constrain import constrained_for
from tasks.device import device_name, for_each_face, peak_memory_bytes
from tasks.events import tell
from tasks.gate import note_likeness, pick_candidate, refuse
from tasks.job import Job
from tasks.keys import restore_key, restored_already
from tasks.units import FaceFound, Failure, PhotoFound, UnitRecord, stage_key, units_of


@task(cache_policy=NO_CACHE)
def restore(job: Job, found: Sequence[PhotoFound], failures: dict[str, Failure]) -> dict[str, Failure]:
    """Write ``restored.png`` of every face; return the failures so far and the new ones, refused faces among them."""
    if job.stub:
        for unit, face in units_of(found, failures).items():
            copy_face(job, unit, face)
        return dict(failures)
    return refuse(job, found, for_each_face(restore_face, job, found, failures))


def restore_face(job: Job, prior: Prior, face: FaceFound) -> None:
    """Restore one face, unless that is done; then drop what the run does not keep."""
    record = UnitRecord.load(job.unit_dir(face.unit))
    if not restored_already(job, prior, face, record):
        start = time.perf_counter()
        settings = job.settings
        constrained = constrained_for(job, prior, face)
        device = next(prior.network.parameters()).device
        y = load_image(record.folder / "input.png").to(device)
        purposes = ["restore", *(f"restore:{i}" for i in range(1, settings.gate.candidates))]
        with computing(constrained.network, settings.precision, settings.compiled) as model:
            candidates = restore_pictures(
                model,
                y.expand(len(purposes), *y.shape),
                prior.schedule,
                noise_step=record.fact("constrain", "noise_step"),
                steps=settings.restore.steps,
                generators=[stream(settings.seed, face.unit, purpose) for purpose in purposes],
                on_step=lambda done, steps: tell(face.unit, "restore", 0.99 * done / steps),
            )
        candidates = keep_tone(candidates.cpu(), y)
        chosen = pick_candidate(job, prior, face, candidates)
        save_image(candidates[chosen], record.folder / "restored.png")
        if job.keep == "all":
            write_delta(constrained, prior, job.delta_file(face.unit))
        else:  # what an earlier run kept belongs to another picture
            job.delta_file(face.unit).unlink(missing_ok=True)
        record.finish(
            "restore",
            restore_key(job, prior, face),
            seconds=time.perf_counter() - start,
            device=device_name(device),
            peak_memory_bytes=peak_memory_bytes(device),
            candidate=chosen,
        )
    note_likeness(job, prior, face)
    job.weights_file(face.unit).unlink(missing_ok=True)
    tell(face.unit, "restore", 1.0)
    if job.keep == "none":
        shutil.rmtree(record.folder / "album", ignore_errors=True)


def copy_face(job: Job, unit: str, face: FaceFound) -> None:
    """What a load test does in place of a restoration; its key is none that a restoration could have."""
    record = UnitRecord.load(job.unit_dir(unit))
    key, restored = stage_key("stub", face.key), record.folder / "restored.png"
    if not record.done("restore", key, [restored]):
        write_atomically(restored, (record.folder / "input.png").read_bytes())
        record.finish("restore", key, seconds=0.0, device="stub")
    tell(unit, "restore", 1.0)
