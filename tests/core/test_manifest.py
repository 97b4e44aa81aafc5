import importlib.util
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rgcp_core import manifest
from rgcp_core.errors import UserError
from rgcp_core.manifest import ManifestRow, compact, read_manifest, write_part

START = datetime(2025, 3, 1, 22, 0, tzinfo=UTC)
DOCS = Path(__file__).parents[2] / "docs/manifest.md"
NEW_IN_2 = [
    "identity_gate_dlib", "identity_album_dlib", "person", "person_similarity", "album_kind", "candidate", "review",
]  # fmt: skip


def face(photo: str = "a.jpg", face_index: int = 0, minute: int = 1, **changes) -> ManifestRow:
    row = ManifestRow(
        run_id="run-1",
        photo=photo,
        photo_sha256="aa",
        unit=f"aa-{face_index}",
        face_index=face_index,
        status="restored",
        output=f"photos/{photo}",
        code_version="0.1.0",
        started_at=START,
        finished_at=START + timedelta(minutes=minute),
    )
    return replace(row, **changes)


def whole(photo: str = "a.jpg", minute: int = 1, **changes) -> ManifestRow:
    row = face(photo, minute=minute, unit=None, face_index=None, status="no_face", output=None)
    return replace(row, **changes)


def merged(run_dir: Path, *rows: ManifestRow) -> list[tuple]:
    """Every row as a part of its own, merged; (photo, face_index, status) of the result."""
    for number, row in enumerate(rows):
        write_part(run_dir, f"part-{number}", [row])
    table = pq.read_table(compact(run_dir))
    return [(row["photo"], row["face_index"], row["status"]) for row in table.to_pylist()]


# What is written comes back


def test_every_column_of_the_contract_is_there_with_its_description():
    contract = (
        "run_id photo photo_sha256 unit face_index status reason box landmarks detector detector_score prior "
        "prior_sha256 preset settings_sha256 seed noise_step guidance_interval guidance_scale album_size "
        "constrain_iterations loss_start loss_end seconds_align seconds_album seconds_constrain "
        "seconds_restore seconds_paste device peak_memory_bytes metrics_unavailable output code_version "
        "started_at finished_at psnr ssim lpips_alex identity_dlib identity_arcface identity_input_dlib "
        "identity_input_arcface album_spread"
    )
    assert set(contract.split()) <= set(manifest.SCHEMA.names)
    assert set(manifest.METRICS) <= set(manifest.SCHEMA.names)
    assert all(len(column.metadata[b"description"]) > 10 for column in manifest.SCHEMA)


def test_values_come_back_as_they_were(tmp_path):
    row = face(
        "Jürgen & Ö/1 <b>.jpg",
        box=[1.5, 2, 30.25, 40],
        landmarks=np.arange(10.0).reshape(5, 2),
        seed=np.int64(7),
        detector_score=np.float32(0.5),
        psnr=float("inf"),  # identical pictures
        reason="",
    )
    write_part(tmp_path, "only", [row])
    (back,) = pq.read_table(compact(tmp_path)).to_pylist()

    assert back["photo"] == "Jürgen & Ö/1 <b>.jpg"
    assert back["box"] == [1.5, 2.0, 30.25, 40.0]
    assert back["landmarks"] == [float(n) for n in range(10)]
    assert (back["seed"], back["detector_score"], back["psnr"]) == (7, 0.5, float("inf"))
    assert back["finished_at"] == START + timedelta(minutes=1)
    assert back["ssim"] is None
    assert back["noise_step"] is None


def test_a_file_name_that_is_not_utf8_is_kept_readable(tmp_path):
    latin1 = b"M\xfcller.jpg".decode("utf-8", "surrogateescape")  # as os.listdir gives it
    assert merged(tmp_path, whole(latin1)) == [("M\\xfcller.jpg", None, "no_face")]


def test_file_carries_descriptions_and_version(tmp_path):
    merged(tmp_path, face())
    schema = pq.read_schema(tmp_path / "manifest.parquet")
    assert schema.metadata[b"schema_version"] == str(manifest.SCHEMA_VERSION).encode()
    assert b"dB" in schema.field("psnr").metadata[b"description"]


def test_no_rows_give_an_empty_manifest_with_all_columns(tmp_path):
    write_part(tmp_path, "empty", [])
    table = read_manifest(compact(tmp_path))
    assert len(table) == 0
    assert list(table.columns) == manifest.SCHEMA.names


# What is wrong is refused


@pytest.mark.parametrize(
    ("column", "changes"),
    [
        ("status", {"status": "done"}),
        ("status", {"status": "failed"}),
        ("status", {"status": "skipped:Too Small", "reason": "It is small."}),
        ("status", {"status": None}),
        ("photo", {"photo": None}),
        ("photo", {"photo": ""}),
        ("photo", {"photo": "/home/me/a.jpg"}),
        ("photo", {"photo": "../a.jpg"}),
        ("photo", {"photo": Path("a.jpg")}),
        ("output", {"output": None}),
        ("output", {"output": "/abs/a.jpg"}),
        ("reason", {"status": "failed:truncated"}),
        ("face_index", {"face_index": None, "unit": None}),
        ("face_index", {"face_index": -1}),
        ("face_index", {"face_index": True}),
        ("face_index", {"status": "no_face"}),
        ("unit", {"unit": None}),
        ("unit", {"face_index": None, "status": "failed:lost", "reason": "It is lost."}),
        ("photo_sha256", {"photo_sha256": None}),
        ("noise_step", {"noise_step": 52.5}),
        ("seed", {"seed": 2**63}),
        ("psnr", {"psnr": "27 dB"}),
        ("psnr", {"psnr": float("nan")}),
        ("box", {"box": [1.0, 2.0, 3.0]}),
        ("box", {"box": "1234"}),
        ("landmarks", {"landmarks": [[0.0, 1.0]] * 10}),
        ("started_at", {"started_at": datetime(2025, 3, 1)}),
        ("started_at", {"started_at": START.astimezone(timezone(timedelta(hours=1)))}),
        ("finished_at", {"finished_at": "2025-03-01"}),
        ("code_version", {"code_version": None}),
    ],
)
def test_a_row_that_cannot_be_right_is_refused_by_row_and_column(tmp_path, column, changes):
    with pytest.raises(UserError, match=rf"row 1 .*, {column}: expected"):
        write_part(tmp_path, "part", [face(), replace(face("b.jpg"), **changes)])
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize("key", ["", "../up", ".hidden", "a/b", "a b"])
def test_a_key_that_is_no_file_name_is_refused(tmp_path, key):
    with pytest.raises(UserError, match="key"):
        write_part(tmp_path, key, [face()])


def test_a_failed_write_leaves_the_earlier_part_and_no_rubbish(tmp_path, monkeypatch):
    path = write_part(tmp_path, "part", [face()])
    before = path.read_bytes()

    def disk_full(table: pa.Table, where: Path, **_: object) -> None:
        Path(where).write_bytes(b"PAR1 half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest.pq, "write_table", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_part(tmp_path, "part", [face(), face(face_index=1)])
    assert path.read_bytes() == before
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


# Merging


def test_rows_are_sorted_by_photo_and_face(tmp_path):
    assert merged(tmp_path, face("b.jpg", 10), face("b.jpg", 9), whole("a/z.jpg"), face("B.jpg")) == [
        ("B.jpg", 0, "restored"),
        ("a/z.jpg", None, "no_face"),
        ("b.jpg", 9, "restored"),
        ("b.jpg", 10, "restored"),
    ]


def test_the_row_that_finished_last_counts_whatever_its_part_is_called(tmp_path):
    failed = {"status": "failed:memory", "reason": "Out of memory.", "output": None}
    assert merged(tmp_path, face(minute=2), face(minute=1, **failed)) == [("a.jpg", 0, "restored")]
    assert merged(tmp_path, face(minute=2), face(minute=3, **failed)) == [("a.jpg", 0, "failed:memory")]


def test_a_photo_has_rows_of_faces_or_one_of_its_own(tmp_path):
    found_later = [whole(minute=1), face(minute=2), face(face_index=1, minute=2)]  # by another detector
    two_faces = [("a.jpg", 0, "restored"), ("a.jpg", 1, "restored")]
    assert merged(tmp_path / "found", *found_later) == two_faces
    truncated = whole(minute=1, status="failed:truncated", reason="The file ends too early.", photo_sha256=None)
    both = [face(minute=2, photo_sha256="bb"), face(face_index=1, minute=3, photo_sha256="bb")]
    assert merged(tmp_path / "mended", truncated, *both) == two_faces
    assert merged(tmp_path / "damaged", *both, replace(truncated, finished_at=START + timedelta(hours=1))) == [
        ("a.jpg", None, "failed:truncated")
    ]


def test_rows_of_a_former_content_of_the_photo_go(tmp_path):
    former = [face(minute=1), face(face_index=1, minute=2)]
    assert merged(tmp_path, *former, face(minute=3, photo_sha256="bb")) == [("a.jpg", 0, "restored")]
    assert read_manifest(tmp_path)["photo_sha256"].tolist() == ["bb"]


def test_same_rows_same_bytes_however_they_are_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "ROWS_AT_ONCE", 7)  # several batches to read, several to write
    rows = [face(f"{photo:02}.jpg", index, minute=photo) for photo in range(17) for index in range(3)]
    write_part(tmp_path / "one", "all", rows)
    shuffled = random.Random(0).sample(rows, len(rows))
    for number in range(0, len(rows), 4):
        write_part(tmp_path / "many", f"part-{number}", shuffled[number : number + 4])
    write_part(tmp_path / "many", "again", rows[:5])

    table = pq.read_table(compact(tmp_path / "many"))
    expected = [(row.photo, row.face_index, row.unit, row.finished_at) for row in rows]
    assert [
        tuple(row.values()) for row in table.select(["photo", "face_index", "unit", "finished_at"]).to_pylist()
    ] == expected
    assert compact(tmp_path / "one").read_bytes() == (tmp_path / "many/manifest.parquet").read_bytes()
    assert compact(tmp_path / "many").read_bytes() == (tmp_path / "one/manifest.parquet").read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_damaged_part_is_named(tmp_path):
    path = write_part(tmp_path, "part", [face()])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"part\.parquet cannot be read"):
        compact(tmp_path)
    assert not (tmp_path / "manifest.parquet").exists()


# Reading


def written_by(version: str, run_dir: Path, without: list[str]) -> Path:
    """A manifest as another version of the schema would have left it."""
    write_part(run_dir, "part", [face(psnr=30.0, seed=3), whole("b.jpg")])
    table = pq.read_table(compact(run_dir)).drop_columns(without)
    pq.write_table(table.replace_schema_metadata({"schema_version": version}), run_dir / "manifest.parquet")
    return run_dir / "manifest.parquet"


def test_an_older_version_is_read_together_with_this_one(tmp_path):
    older = written_by("0", tmp_path / "older", without=["psnr", "album_size", "box", "finished_at"])
    merged(tmp_path / "newer", face("c.jpg", psnr=20.0, album_size=16))
    table = read_manifest([older, tmp_path / "newer"])

    assert list(table.columns) == manifest.SCHEMA.names
    assert table["photo"].tolist() == ["a.jpg", "b.jpg", "c.jpg"]
    assert table["psnr"].isna().tolist() == [True, True, False]
    assert table["album_size"].tolist() == [pd.NA, pd.NA, 16]
    assert table["seed"].tolist() == [3, pd.NA, pd.NA]
    assert table["finished_at"].isna().tolist() == [True, True, False]


def test_a_newer_version_is_refused(tmp_path):
    path = written_by(str(manifest.SCHEMA_VERSION + 1), tmp_path, without=[])
    with pytest.raises(UserError, match="newer"):
        read_manifest(path)


def test_what_is_no_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match="no manifest"):
        read_manifest(tmp_path)
    pq.write_table(pa.table({"photo": ["a.jpg"]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="schema_version"):
        read_manifest(tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("photo,status")
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(tmp_path / "text.parquet")


def test_pandas_reads_it_without_us(tmp_path):
    merged(tmp_path, face(psnr=30.0), whole("b.jpg"))
    table = pd.read_parquet(tmp_path / "manifest.parquet")
    assert table.query("status == 'restored'")["psnr"].tolist() == [30.0]


@pytest.mark.skipif(importlib.util.find_spec("duckdb") is None, reason="DuckDB is not installed")
def test_duckdb_reads_two_versions_together(tmp_path):
    import duckdb

    older = written_by("1", tmp_path / "older", without=["psnr", "box", *NEW_IN_2])
    merged(tmp_path / "newer", face("c.jpg", psnr=20.0, person="Ada"))
    files = [str(older), str(tmp_path / "newer/manifest.parquet")]
    query = f"SELECT photo, psnr, person FROM read_parquet({files}, union_by_name = true) ORDER BY photo"
    assert duckdb.sql(query).fetchall() == [("a.jpg", None, None), ("b.jpg", None, None), ("c.jpg", 20.0, "Ada")]


@pytest.mark.skipif(importlib.util.find_spec("polars") is None, reason="Polars is not installed")
def test_polars_reads_it(tmp_path):
    import polars

    merged(tmp_path, face(psnr=30.0, box=[1, 2, 3, 4]), whole("b.jpg"))
    table = polars.read_parquet(tmp_path / "manifest.parquet")
    assert table["psnr"].to_list() == [30.0, None]
    assert table["box"].to_list() == [[1.0, 2.0, 3.0, 4.0], None]


@pytest.mark.skipif(importlib.util.find_spec("polars") is None, reason="Polars is not installed")
def test_polars_reads_two_versions_together(tmp_path):
    import polars

    older = written_by("1", tmp_path / "older", without=NEW_IN_2)
    merged(tmp_path / "newer", face("c.jpg", person="Ada"))
    tables = [polars.read_parquet(path) for path in (older, tmp_path / "newer/manifest.parquet")]
    table = polars.concat(tables, how="diagonal").sort("photo")
    assert table["person"].to_list() == [None, None, "Ada"]


def test_rows_of_version_1_have_no_person(tmp_path):
    older = written_by("1", tmp_path / "older", without=NEW_IN_2)
    merged(tmp_path / "newer", face("c.jpg", person="Ada", candidate=1))
    table = read_manifest([older, tmp_path / "newer"]).set_index("photo")
    assert table["person"].isna().to_dict() == {"a.jpg": True, "b.jpg": True, "c.jpg": False}
    assert table.loc["c.jpg", ["person", "candidate"]].tolist() == ["Ada", 1]


# The page


def test_the_page_lists_the_columns_as_they_are():
    page = DOCS.read_text(encoding="utf-8")
    assert page == manifest.with_schema(page), "run: python -m rgcp_core.manifest docs/manifest.md"
    for column in manifest.SCHEMA:
        assert f"| `{column.name}` |" in page
