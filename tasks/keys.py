"""Keys of the stages of one face; each contains the key of the stage before it."""

from typing import Any

from rgcp_core.prior import Prior
from tasks.job import Job
from tasks.units import FaceFound, UnitRecord, stage_key


def album_key(job: Job, prior: Prior, face: FaceFound) -> str:
    """Key of a face's album."""
    settings = job.settings
    drawn_by = (prior.card.sha256, settings.seed, *settings.arithmetic())
    return stage_key("album", face.key, *drawn_by, settings.album.deciding())


def constrain_key(job: Job, prior: Prior, face: FaceFound) -> str:
    """Key of a face's constrained prior; a personal one has no generative album before it.

    The restoration's K is part of it, or what it is picked by: the stage settles which K the face is restored from and
    notes it.
    """
    settings, noise_step = job.settings, noise_step_key(job, prior)
    if face.person_sha256 is not None:
        personal = (face.key, prior.card.sha256, face.person_sha256, settings.seed, *settings.arithmetic())
        return stage_key("personal", *personal, noise_step)
    return stage_key("constrain", album_key(job, prior, face), settings.constrain.deciding(), noise_step)


def noise_step_key(job: Job, prior: Prior) -> Any:
    """What a key says of the restoration's K: stated, or ``auto`` by the card's law of detail."""
    wanted, detail = job.settings.restore.noise_step, prior.card.detail
    return [wanted, detail.model_dump()] if wanted == "auto" and detail is not None else wanted


def restore_key(job: Job, prior: Prior, face: FaceFound) -> str:
    """Key of a restored face.

    It says "in tone" since the faces of monochrome prints come back in theirs; their albums stayed as they were.
    """
    candidates = job.settings.gate.candidates
    best_of = [candidates] if candidates > 1 else []
    return stage_key("restore in tone", constrain_key(job, prior, face), job.settings.restore.deciding(), *best_of)


def restored_already(job: Job, prior: Prior, face: FaceFound, record: UnitRecord) -> bool:
    """Whether the restored face is on disk under its key, and with it the constrained prior if that is to be kept."""
    outputs = [record.folder / "restored.png", *([job.delta_file(face.unit)] if job.keep == "all" else [])]
    return record.done("restore", restore_key(job, prior, face), outputs)
