"""Keep the best of several restorations of a face, and refuse one that shows somebody else."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rgcp_core.errors import UserError
from rgcp_core.gate import SMALLEST, Likeness, best_candidate, likeness, refusal
from rgcp_core.images import load_image
from rgcp_core.metrics.quality import load_quality
from rgcp_core.people import load_person
from rgcp_core.prior import Card, Prior, find_prior, read_card
from tasks.album import album_files
from tasks.job import Job
from tasks.recognise import identity_model
from tasks.units import FaceFound, Failure, PhotoFound, UnitRecord, stage_key, units_of

STATUS = "skipped:identity"
"""Of a face whose restoration was refused: the photo keeps the face as it was."""
NEAR = 0.01
"""A result that passed by less than this is kept, and flagged for somebody to look at."""


def judges(job: Job, card: Card) -> bool:
    """Whether results can be judged: faces, large enough, and the recognition network is here."""
    if not job.shows_faces or card.image_size < SMALLEST:
        return False
    try:
        identity_model()
    except UserError:  # the manifest says that identity was not measured, and why
        return False
    return True


def album_embeddings(job: Job, face: FaceFound) -> Tensor | None:
    """Embeddings (N,D) of the album that restored a face; None where an earlier run has dropped it."""
    if face.person is not None and job.people is not None:
        return load_person(job.people, face.person).embeddings
    files = album_files(job, face.unit)
    if not all(path.is_file() for path in files):
        return None
    pictures = torch.stack([load_image(path) for path in files])
    return identity_model().embed(pictures, read_card(find_prior(job.prior)).crop_window)


def likenesses(job: Job, prior: Prior, face: FaceFound, results: Tensor) -> list[Likeness]:
    """How like its input and its album each of a face's restorations (N,3,H,W) is."""
    y, album = load_image(job.unit_dir(face.unit) / "input.png"), album_embeddings(job, face)
    return [likeness(result, y, album, identity_model(), prior.card.crop_window) for result in results]


def pick_candidate(job: Job, prior: Prior, face: FaceFound, results: Tensor) -> int:
    """Number of the restoration (N,3,H,W) to keep; 0 where there is one, or where it shows no face."""
    if len(results) == 1 or not judges(job, prior.card):
        return 0
    try:
        quality = load_quality("musiq_koniq")(results).tolist()
    except UserError:  # a network that is not here decides nothing
        quality = None
    return best_candidate(likenesses(job, prior, face, results), quality)


def note_likeness(job: Job, prior: Prior, face: FaceFound) -> None:
    """Measure a restored face, unless that is done, and note it: the album may be dropped afterwards."""
    if not judges(job, prior.card) or noted_likeness(job, face) is not None:
        return
    record = UnitRecord.load(job.unit_dir(face.unit))
    found = likenesses(job, prior, face, load_image(record.folder / "restored.png")[None])[0]
    record.finish(
        "gate",
        stage_key("gate", record.fact("restore", "key")),
        at_input=found.at_input,
        input=found.input,
        album=found.album,
    )


def refuse(job: Job, found: Sequence[PhotoFound], failures: dict[str, Failure]) -> dict[str, Failure]:
    """The failures so far, and the faces whose restorations are not surely the person of the photo."""
    failures = dict(failures)
    if not job.settings.gate.enabled:
        return failures
    for unit, face in units_of(found, failures).items():
        measured = noted_likeness(job, face)
        reason = None if measured is None else _refusal(job, face, measured)
        if reason is not None:
            failures[unit] = Failure(STATUS, reason)
    return failures


def noted_likeness(job: Job, face: FaceFound) -> Likeness | None:
    """What was measured of the restoration that is on disk."""
    record = UnitRecord.load(job.unit_dir(face.unit))
    if record.fact("gate", "key") is None or record.fact("gate", "key") != stage_key(
        "gate", record.fact("restore", "key")
    ):
        return None
    return Likeness(*(record.fact("gate", name) for name in ("at_input", "input", "album")))


def worth_a_look(job: Job, face: FaceFound, measured: Likeness | None, refused: bool) -> str | None:
    """Why somebody should look at a face that was restored or refused; None: there is no need."""
    if refused:
        return "refused"
    if measured is None or not job.settings.gate.enabled:
        return None
    if _refusal(job, face, measured, NEAR) is not None:
        return "kept, but its identity is close to the limit"
    gate = job.settings.gate
    if face.person is not None and (face.person_similarity or 0.0) < gate.person_auto:
        return f"taken for {face.person} because the command named them; for --person auto it would not be like enough"
    return None


def _refusal(job: Job, face: FaceFound, measured: Likeness, above: float = 0.0) -> str | None:
    gate = job.settings.gate
    if face.person is None:
        return refusal(measured, min_input=gate.min_input + above, min_album=None)
    return refusal(measured, min_input=gate.min_input_personal + above, min_album=gate.min_album + above)
