"""Find and align the faces of a chunk of photos."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from rgcp_core.errors import UnitError, UserError
from rgcp_core.faces.align import FFHQ_WINDOW, Alignment, align_face, crop_face
from rgcp_core.faces.detect import Detector, Face, gate_faces, load_detector
from rgcp_core.framing import Box, centre_box, frame_box, read_boxes
from rgcp_core.images import Photo, load_photo, restored_name, save_image
from rgcp_core.prior import Card, find_prior, read_card
from tasks.events import check_stop, tell
from tasks.job import Framing, Job
from tasks.recognise import recognise
from tasks.units import FaceFound, Failure, PhotoFound, UnitRecord, photo_failure, stage_key


@task(cache_policy=NO_CACHE)
def align(job: Job, photos: Sequence[str]) -> list[PhotoFound]:
    """Write ``input.png`` of every face that can be restored, and say of all others why not.

    Args:
        job: the run.
        photos: their names below ``job.base``.
    """
    card = read_card(find_prior(job.prior))
    found = []
    for photo in photos:
        check_stop()
        found.append(align_photo(job, card, photo))
    return recognise(job, card, found)


def align_photo(job: Job, card: Card, name: str) -> PhotoFound:
    """Align the faces of one photo; a photo that cannot be read comes back with its failure."""
    start, started_at = time.perf_counter(), datetime.now(UTC).isoformat()
    if job.framing == "boxes" and not boxes_of(job, name):
        reason = "The table of boxes names no part of this photo."
        return PhotoFound(name, started_at, failure=Failure("skipped:no_box", reason))
    try:
        photo = load_photo(job.base / name)
        if job.framing == "photos":
            detector = _detector(job.settings.faces.detector)
            faces, detector_name = _detected_faces(job, card, photo, detector), detector.name
        elif job.shows_faces:
            faces, detector_name = [_whole_picture(job, card, photo)], None
        else:
            boxes = boxes_of(job, name) if job.framing == "boxes" else [centre_box(photo.size)]
            faces = [_framed(job, card, photo, index, box) for index, box in enumerate(boxes)]
            detector_name = None
    except UnitError as error:
        return PhotoFound(name, started_at, failure=photo_failure(job, name, error))
    return PhotoFound(
        name,
        started_at,
        sha256=photo.sha256,
        output=f"photos/{restored_name(name, photo.format)}",
        detector=detector_name,
        seconds=time.perf_counter() - start,
        faces=tuple(faces),
    )


def _detected_faces(job: Job, card: Card, photo: Photo, detector: Detector) -> list[FaceFound]:
    settings = job.settings.faces
    gated = gate_faces(
        detector(photo.rgb),
        photo.size,
        crop_window=card.crop_window,
        min_score=settings.min_score,
        min_size=settings.min_size,
        prior_size=card.image_size,
        max_scale=settings.max_enlargement,
    )
    found = []
    for index, (face, reason) in enumerate(gated):
        if reason is not None:
            failure = Failure(f"skipped:{reason}", _why_skipped(reason, face, job))
            found.append(_face_found(photo, index, face, failure=failure))
            continue
        alignment = align_face(face.landmarks, card.image_size, card.crop_window)
        key = _write_crop(job, photo, _unit(photo, index), alignment)
        tell(_unit(photo, index), "align", 1.0)
        found.append(_face_found(photo, index, face, key=key))
    return found


def _whole_picture(job: Job, card: Card, photo: Photo) -> FaceFound:
    """The one face of a crop that came aligned."""
    width, height = photo.size
    if width != height:
        raise UnitError("not_square", f"An aligned crop must be square; this one is {width} x {height}.")
    key = _write_crop(job, photo, _unit(photo, 0), whole_picture(width, card, job.framing))
    return FaceFound(_unit(photo, 0), 0, key)


def whole_picture(side: int, card: Card, framing: Framing) -> Alignment:
    """Where the prior's picture lies in a square crop of ``side`` pixels that came aligned."""
    x0, y0, x1, y1 = card.crop_window if framing == "ffhq" else FFHQ_WINDOW
    scale = side / card.image_size
    return Alignment(np.array([[scale * (x1 - x0), 0, x0 * side], [0, scale * (y1 - y0), y0 * side]]), card.image_size)


def _framed(job: Job, card: Card, photo: Photo, index: int, box: Box) -> FaceFound:
    """A part of the photo that need not be a face."""
    unit, settings = f"{photo.sha256[:16]}-{stage_key('box', box)[:6]}", job.settings.faces  # copies may differ in it
    place = (box.x, box.y, box.x + box.width, box.y + box.height)
    try:
        alignment = frame_box(box, photo.size, card.image_size)
    except UnitError as error:
        return FaceFound(unit, index, "", Failure(f"failed:{error.reason}", str(error)), box=place)
    side = alignment.scale * card.image_size
    failure = None
    if side < settings.min_size:
        reason = f"The square is {side:.0f} pixels wide; at least {settings.min_size:g} are needed."
        failure = Failure("skipped:too_small", reason)
    elif alignment.scale > settings.max_enlargement:
        reason = (
            f"The square is {side:.0f} pixels wide, over {settings.max_enlargement:g} times the {card.image_size} that "
            "the prior can draw: restoring would blur it. Use a larger prior, or raise faces.max_enlargement."
        )
        failure = Failure("skipped:larger_than_prior", reason)
    if failure is not None:
        return FaceFound(unit, index, "", failure, box=place)
    key = _write_crop(job, photo, unit, alignment)
    tell(unit, "align", 1.0)
    return FaceFound(unit, index, key, box=place)


def boxes_of(job: Job, name: str) -> list[Box]:
    """What the run's table says of one photo."""
    if job.boxes is None:
        return []
    try:
        changed = job.boxes.stat().st_mtime_ns
    except OSError as error:
        raise UserError(f"The table of boxes {job.boxes} cannot be read: {error.strerror}.") from error
    return _boxes(job.boxes, changed).get(name, [])


@lru_cache(maxsize=1)
def _boxes(path: Path, changed: int) -> dict[str, list[Box]]:
    return read_boxes(path)


def _write_crop(job: Job, photo: Photo, unit: str, alignment: Alignment) -> str:
    record = UnitRecord.load(job.unit_dir(unit))
    place = alignment.to_json()
    key = stage_key("align", photo.sha256, place)
    path = record.folder / "input.png"
    if not record.done("align", key, [path]):
        save_image(crop_face(photo.rgb, alignment), path)
        record.finish("align", key, alignment=place)
    return key


def _face_found(photo: Photo, index: int, face: Face, *, key: str = "", failure: Failure | None = None) -> FaceFound:
    return FaceFound(
        _unit(photo, index),
        index,
        key,
        failure,
        box=tuple(map(float, face.box)),
        landmarks=tuple(map(float, face.landmarks.flatten())),
        score=face.score,
    )


def _unit(photo: Photo, index: int) -> str:
    return f"{photo.sha256[:16]}-{index:02d}"


def _why_skipped(reason: str, face: Face, job: Job) -> str:
    """A gate's reason as a sentence with the numbers it rests on."""
    settings = job.settings.faces
    width, height = (float(x) for x in face.box[2:] - face.box[:2])
    return {
        "low_score": f"The detector is not sure that this is a face: {face.score:.2f}, wanted {settings.min_score:g}.",
        "duplicate": "The same face was found twice; the better box is used.",
        "too_small": f"The face is {width:.0f} x {height:.0f} pixels; at least {settings.min_size:g} are needed.",
        "bad_landmarks": "Eyes and mouth were not found where a face has them.",
        "out_of_frame": "Too much of the face lies outside the photo.",
        "larger_than_prior": f"The face is {width:.0f} pixels wide, over {settings.max_enlargement:g} times the detail "
        "that the prior can draw: restoring would blur it. Use a larger prior, or raise faces.max_enlargement.",
    }[reason]


@lru_cache(maxsize=1)
def _detector(name: str) -> Detector:
    return load_detector(name)
