"""Paste restored faces back into their photos."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from rgcp_core.errors import UnitError
from rgcp_core.faces.align import Alignment
from rgcp_core.faces.paste import paste_face
from rgcp_core.images import load_image, load_photo, save_photo
from rgcp_core.prior import find_prior, read_card
from rgcp_core.provenance import Restoration, xmp_packet
from tasks.gate import STATUS as REFUSED
from tasks.job import Job
from tasks.units import Failure, PhotoFound, UnitRecord, photo_failure, stage_key

NO_FAILURE = Failure("", "")


@task(cache_policy=NO_CACHE)
def paste(job: Job, found: Sequence[PhotoFound], failures: dict[str, Failure]) -> dict[str, Failure]:
    """Write every photo with a restored face under ``photos/``; return the failures so far and the new ones.

    A photo whose faces all failed is not written: there is nothing new in it.
    """
    failures = dict(failures)
    for photo in found:
        units = [face.unit for face in photo.faces if face.failure is None and face.unit not in failures]
        if not units:
            if photo.output and any(failures.get(face.unit, NO_FAILURE).status == REFUSED for face in photo.faces):
                (job.out / photo.output).unlink(missing_ok=True)  # of an earlier run that kept what is refused now
            continue
        try:
            paste_photo(job, photo, units)
        except UnitError as error:
            failures |= dict.fromkeys(units, photo_failure(job, photo.photo, error))
    return failures


def paste_photo(job: Job, photo: PhotoFound, units: Sequence[str]) -> None:
    """Paste the faces of one photo, unless the result is there under its key."""
    assert photo.output is not None
    records = [UnitRecord.load(job.unit_dir(unit)) for unit in units]
    stage = f"paste {photo.output}"
    card = read_card(find_prior(job.prior))
    restored_keys = [record.fact("restore", "key") for record in records]
    key = stage_key("paste", job.framing, card.sha256, job.settings.digest(), restored_keys)
    output = job.out / photo.output
    if all(record.done(stage, key, [output]) for record in records):
        return
    start = time.perf_counter()
    original = load_photo(job.base / photo.photo)
    if original.sha256 != photo.sha256:
        raise UnitError("changed", "The photo was changed while it was being restored; run the command again.")
    pixels = original.pixels
    for record in records:
        alignment = Alignment.from_json(record.fact("align", "alignment"))
        restored = load_image(record.folder / "restored.png")
        pixels, _ = paste_face(original, pixels, restored, alignment)
    output.parent.mkdir(parents=True, exist_ok=True)
    said = Restoration(
        source=photo.photo,
        source_sha256=original.sha256,
        units=tuple(units),
        prior=card.name,
        prior_sha256=card.sha256,
        preset=job.settings.preset,
        settings_sha256=job.settings.digest(),
        seed=job.settings.seed,
    )
    save_photo(original, np.ascontiguousarray(pixels), Path(output), xmp=xmp_packet(said, original.xmp))
    for record in records:
        record.finish(stage, key, seconds=(time.perf_counter() - start) / len(records))
