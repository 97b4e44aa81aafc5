"""The faces of an archive with their embeddings, and who they seem to be."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE

from rgcp_core.faces.align import Alignment
from rgcp_core.images import load_image
from rgcp_core.metrics.identity import load_identity
from rgcp_core.personal_album import MIN_DETAIL, sharpness
from rgcp_core.prior import find_prior, read_card
from rgcp_core.proposal import FOUND, PARTS, crop_file, group_faces, write_proposal, write_table
from tasks.events import check_stop
from tasks.job import Job
from tasks.personal import IDENTITY
from tasks.units import Failure, PhotoFound, UnitRecord


def part_file(job: Job, key: str) -> Path:
    """What is known of the faces of one chunk of photos."""
    return job.out / PARTS / f"{key}.parquet"


@task(cache_policy=NO_CACHE)
def embed(job: Job, key: str, found: Sequence[PhotoFound]) -> int:
    """Embed the aligned faces of a chunk and write its part; return how many there are."""
    identity, window = load_identity(IDENTITY), read_card(find_prior(job.prior)).crop_window
    rows: list[dict[str, Any]] = []
    for photo in found:
        check_stop()
        of_photo = {"photo": photo.photo, "photo_sha256": photo.sha256}
        if not photo.faces:
            failure = photo.failure or Failure("no_face", "No face was found in this photo.")
            rows.append({**of_photo, "status": failure.status, "reason": failure.reason})
        for face in photo.faces:
            row = {**of_photo, "unit": face.unit, "face_index": face.index, "box": face.box}
            if face.failure is not None:
                rows.append({**row, "status": face.failure.status, "reason": face.failure.reason})
                continue
            crop = load_image(crop_file(job.out, face.unit))
            place = UnitRecord.load(job.unit_dir(face.unit)).fact("align", "alignment")
            rows.append(
                {
                    **row,
                    "status": "found",
                    "detail": Alignment.from_json(place).scale,
                    "sharpness": sharpness(crop),
                    "embedding": identity.embed(crop[None], window)[0].tolist(),
                }
            )
    write_table(pa.Table.from_pylist(rows, FOUND), part_file(job, key))
    return sum(row["status"] == "found" for row in rows)


@task(cache_policy=NO_CACHE)
def propose(job: Job, keys: Sequence[str], min_similarity: float) -> list[int]:
    """Cluster the faces of all chunks and write the proposal; return the clusters proposed."""
    rows = [row for key in keys for row in pq.read_table(part_file(job, key)).to_pylist()]
    table = group_faces(_each_face_once(rows), job.out, min_similarity=min_similarity, min_detail=MIN_DETAIL)
    return write_proposal(table, job.out)


def _each_face_once(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies of a file have the same units: their faces count once, in the first of them."""
    seen: set[str] = set()
    kept = []
    for row in rows:
        if row["unit"] is not None and row["status"] == "found":
            if row["unit"] in seen:
                row = {**row, "status": "skipped:copy", "reason": "Another file holds the very same photo."}
            seen.add(row["unit"])
        kept.append(row)
    return kept
