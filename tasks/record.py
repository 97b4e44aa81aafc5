"""Write what happened to every photo and face of a chunk into the manifest."""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE

from rgcp_core.manifest import ManifestRow, write_part
from rgcp_core.prior import Card, find_prior, read_card
from tasks.evaluate import Measurement
from tasks.gate import STATUS as REFUSED
from tasks.gate import noted_likeness, worth_a_look
from tasks.job import Job
from tasks.units import FaceFound, Failure, PhotoFound, UnitRecord

STUB_OUTCOME: dict[str, Any] = {
    "status": "skipped:stub",
    "reason": "A load test (--device stub): the face was copied, not restored.",
}


@task(cache_policy=NO_CACHE)
def record(
    job: Job,
    chunk_key: str,
    found: Sequence[PhotoFound],
    failures: dict[str, Failure],
    measurement: Measurement,
) -> dict[str, int]:
    """Write the chunk's part of the manifest; return how many rows have each status.

    Args:
        job: the run.
        chunk_key: names the part; the same chunk writes the same part again.
        found: the photos, from the align task.
        failures: by unit, from all tasks.
        measurement: metrics by unit, from the evaluate task.
    """
    card = read_card(find_prior(job.prior))
    rows = [row for photo in found for row in photo_rows(job, card, photo, failures, measurement)]
    return _write(job, chunk_key, rows, len(found))


def record_crashed(job: Job, chunk_key: str, photos: Sequence[str], reason: str) -> dict[str, int]:
    """Record the photos of a chunk whose tasks broke down; return how many rows have each status."""
    card = read_card(find_prior(job.prior))
    failure, now = Failure("failed:crashed", reason), datetime.now(UTC).isoformat()
    found = [PhotoFound(photo, now, failure=failure) for photo in photos]
    rows = [row for photo in found for row in photo_rows(job, card, photo, {}, Measurement())]
    return _write(job, chunk_key, rows, len(found))


def _write(job: Job, chunk_key: str, rows: Sequence[ManifestRow], photos: int) -> dict[str, int]:
    write_part(job.out, chunk_key, rows)
    return {"photos": photos, **Counter(row.status.partition(":")[0] for row in rows)}


def photo_rows(
    job: Job, card: Card, photo: PhotoFound, failures: dict[str, Failure], measurement: Measurement
) -> list[ManifestRow]:
    """One row a face, or one for a photo without any."""
    finished_at = datetime.now(UTC)
    settings = job.settings
    common: dict[str, Any] = {
        "run_id": job.run_id,
        "photo": photo.photo,
        "photo_sha256": photo.sha256,
        "detector": photo.detector,
        "prior": card.name,
        "prior_sha256": card.sha256,
        "preset": settings.preset,
        "settings_sha256": settings.digest(),
        "seed": settings.seed,
        "code_version": job.code_version,
        "started_at": datetime.fromisoformat(photo.started_at),
        "finished_at": finished_at,
    }
    if not photo.faces:
        failure = photo.failure or Failure("no_face", "No face was found in this photo.")
        return [ManifestRow(**common, status=failure.status, reason=failure.reason)]
    rows = []
    outcome: dict[str, Any] = STUB_OUTCOME if job.stub else {"status": "restored"}
    for face in photo.faces:
        left_out = face.failure or failures.get(face.unit)
        place: dict[str, Any] = {
            "unit": face.unit,
            "face_index": face.index,
            "box": face.box,
            "landmarks": face.landmarks,
            "detector_score": face.score,
            "seconds_align": photo.seconds / len(photo.faces),
        }
        place |= {"person_similarity": face.person_similarity}
        refused = left_out is not None and left_out.status == REFUSED
        measured = noted_likeness(job, face) if left_out is None or refused else None
        gated: dict[str, Any] = {"review": worth_a_look(job, face, measured, refused)}
        if measured is not None:
            gated |= {"identity_gate_dlib": measured.at_input, "identity_album_dlib": measured.album}
        if left_out is not None and refused:
            facts = {**_restored_facts(job, photo, face), "output": None}
            gated["identity_input_dlib"] = None if measured is None else measured.input
            outcome_here: dict[str, Any] = {"status": left_out.status, "reason": left_out.reason}
            rows.append(ManifestRow(**common, **place, **facts, **gated, **outcome_here))
        elif left_out is not None:
            rows.append(ManifestRow(**common, **place, status=left_out.status, reason=left_out.reason))
        else:
            metrics: dict[str, Any] = dict(measurement.metrics.get(face.unit, {}))
            rows.append(
                ManifestRow(
                    **common,
                    **place,
                    **_restored_facts(job, photo, face),
                    **metrics,
                    **gated,
                    metrics_unavailable=measurement.unavailable or None,
                    **outcome,
                )
            )
    return rows


def _restored_facts(job: Job, photo: PhotoFound, face: FaceFound) -> dict[str, Any]:
    record = UnitRecord.load(job.unit_dir(face.unit))
    settings = job.settings
    stages = ("album", "constrain", "restore") if face.person is None else ("restore",)
    peaks = [record.fact(stage, "peak_memory_bytes") for stage in stages]
    return {
        "output": photo.output,
        "noise_step": record.fact("constrain", "noise_step"),
        "guidance_interval": settings.album.guidance_interval,
        "guidance_scale": settings.album.guidance_scale,
        "album_size": settings.album.size if face.person is None else record.fact("constrain", "album_size"),
        "constrain_iterations": record.fact("constrain", "iterations"),
        "album_kind": None if job.stub else "generative" if face.person is None else "personal",
        "person": face.person,
        "candidate": record.fact("restore", "candidate"),
        "loss_start": record.fact("constrain", "loss_start"),
        "loss_end": record.fact("constrain", "loss_end"),
        "seconds_album": record.fact("album", "seconds") if face.person is None else None,
        "seconds_constrain": record.fact("constrain", "seconds"),
        "seconds_restore": record.fact("restore", "seconds"),
        "seconds_paste": record.fact(f"paste {photo.output}", "seconds"),
        "device": record.fact("restore", "device"),
        "peak_memory_bytes": max((peak for peak in peaks if peak is not None), default=None),
        "album_spread": record.fact("album", "spread") if face.person is None else None,
    }


def versions() -> dict[str, str]:
    """Versions of what decides the pixels, for run.json."""
    import platform

    import numpy
    import PIL
    import prefect

    import rgcp_core

    return {
        "rgcp": rgcp_core.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "prefect": prefect.__version__,
    }
