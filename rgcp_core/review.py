"""``review.parquet``: the faces of a run that somebody should look at, refused ones first."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rgcp_core.manifest import read_table, replacing

REVIEW = "review.parquet"
COLUMNS = (
    *("photo", "unit", "face_index", "status", "review", "reason", "person", "person_similarity", "album_kind"),
    *("identity_gate_dlib", "identity_input_dlib", "identity_album_dlib"),
)
"""Columns of the manifest that are repeated here; ``input`` and ``restored``, paths below the run's folder, follow."""


def write_review(run_dir: Path) -> Path:
    """Write the faces whose manifest row says `review`, those that were refused first; no rows when there are none."""
    rows = [row for row in read_table(run_dir, COLUMNS).to_pylist() if row["review"] is not None]
    rows.sort(key=lambda row: (row["status"] == "restored", row["identity_gate_dlib"] or 0.0))
    for row in rows:
        row["input"], row["restored"] = (f"faces/{row['unit']}/{name}.png" for name in ("input", "restored"))
    numbers = {"person_similarity", "identity_gate_dlib", "identity_input_dlib", "identity_album_dlib"}
    kinds = {**dict.fromkeys(numbers, pa.float64()), "face_index": pa.int64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in (*COLUMNS, "input", "restored")])
    path = run_dir / REVIEW
    with replacing(path, run_dir) as unfinished:
        pq.write_table(pa.Table.from_pylist(rows, schema), unfinished)
    return path
