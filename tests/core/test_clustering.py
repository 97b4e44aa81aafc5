"""Grouping faces by person and choosing albums, against brute force and closed forms; proposals as files."""

import csv
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rgcp_core.clustering import cluster_faces, sharp_and_varied, similarity_to_centre
from rgcp_core.errors import UserError
from rgcp_core.forget import forget_in_run, forget_person
from rgcp_core.images import save_image
from rgcp_core.proposal import (
    FOUND,
    PARTS,
    crop_file,
    forget_in_proposal,
    group_faces,
    read_confirmed,
    read_people,
    write_albums,
    write_proposal,
    write_table,
)


def brute_force(embeddings: np.ndarray, min_similarity: float) -> set[frozenset[int]]:
    """Average linkage by its definition: join the two groups of highest mean cosine while that is high enough."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosine = unit @ unit.T
    groups = [frozenset([i]) for i in range(len(unit))]
    while len(groups) > 1:
        pairs = list(combinations(groups, 2))
        means = [cosine[np.ix_(list(a), list(b))].mean() for a, b in pairs]
        best = int(np.argmax(means))
        if means[best] < min_similarity:
            break
        a, b = pairs[best]
        groups = [group for group in groups if group not in (a, b)] + [a | b]
    return set(groups)


def people(sizes: tuple[int, ...], spread: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.normal(size=(len(sizes), 8)), sizes, axis=0)
    return (centres + spread * rng.normal(size=centres.shape)) * rng.uniform(0.5, 2, (len(centres), 1))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("min_similarity", [0.6, 0.8, 0.95])
def test_clusters_are_those_of_average_linkage(seed: int, min_similarity: float) -> None:
    embeddings = people((5, 4, 3, 1, 1), 0.4, seed)
    labels = cluster_faces(embeddings, min_similarity)
    groups = {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}
    assert groups == brute_force(embeddings, min_similarity)


def test_clusters_are_numbered_by_size_and_then_by_their_first_face() -> None:
    embeddings = people((1, 2, 4, 2), 0.01)
    assert cluster_faces(embeddings, 0.9).tolist() == [3, 1, 1, 0, 0, 0, 0, 2, 2]


def test_few_and_unusable_faces() -> None:
    assert cluster_faces(np.zeros((0, 8))).tolist() == []
    assert cluster_faces(np.ones((1, 8))).tolist() == [0]
    with pytest.raises(UserError, match="finite"):
        cluster_faces(np.full((3, 8), np.nan))
    with pytest.raises(UserError, match="too many"):
        cluster_faces(np.ones((20_001, 2)))


def test_similarity_to_the_centre_of_two_is_the_cosine_of_half_their_angle() -> None:
    angle = 0.7
    embeddings = np.array([[3.0, 0.0], [np.cos(angle), np.sin(angle)], [-1.0, 0.0]])
    expected = [np.cos(angle / 2), np.cos(angle / 2), 1.0]
    np.testing.assert_allclose(similarity_to_centre(embeddings, np.array([0, 0, 1])), expected)


def test_albums_are_sharp_first_and_then_varied() -> None:
    looks = np.array([0.0, 1.0, 10.0, 5.0, 100.0, 50.0])[:, None]
    sharpness = [9.0, 8.0, 7.0, 6.0, 1.0, 2.0]
    assert sharp_and_varied(looks, sharpness, 3) == [0, 2, 1]  # of the sharper half: 0, then 10, then 1
    assert sharp_and_varied(looks, sharpness, 4) == [0, 2, 3, 1]
    assert sorted(sharp_and_varied(looks, sharpness, 20)) == list(range(6))
    assert sharp_and_varied(looks[:0], [], 3) == []


def test_alike_faces_are_chosen_once_each() -> None:
    assert sorted(sharp_and_varied(np.zeros((5, 4)), [1.0] * 5, 4)) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------ the proposal


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Two people with four and three faces, a stranger, and a photo that could not be read."""
    embeddings, generator = people((4, 3, 1), 0.01), torch.Generator().manual_seed(0)
    rows = []
    for i, embedding in enumerate(embeddings):
        unit = f"unit{i}-00"
        crop = torch.rand(3, 16, 16, generator=generator) * 2 - 1
        save_image(crop, crop_file(tmp_path, unit))
        rows.append(
            {"photo": f"p{i}.png", "photo_sha256": str(i), "unit": unit, "face_index": 0, "status": "found",
             "detail": 0.2 if i == 3 else 2.0, "sharpness": 100.0 + i, "embedding": embedding.tolist()}
        )  # fmt: skip
    rows.append({"photo": "bad.jpg", "status": "failed:empty", "reason": "empty"})
    table = pa.Table.from_pylist(rows, FOUND)
    write_table(table, tmp_path / PARTS / "key.parquet")
    assert write_proposal(group_faces(table.to_pylist(), tmp_path, min_similarity=0.9), tmp_path) == [1, 2]
    return tmp_path


def edit(out: Path, changes: dict[str, dict[str, str]], delimiter: str = ",") -> None:
    with (out / "proposal.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= changes.get(row["unit"], {})
    with (out / "proposal.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def test_a_proposal_has_every_face_and_photo(out: Path) -> None:
    table = read_people(out).to_pandas()
    assert table["cluster"].dropna().astype(int).tolist() == [1, 1, 1, 1, 2, 2, 2, 3]
    assert table[table.status == "failed:empty"].photo.tolist() == ["bad.jpg"]
    assert set(table[table.proposed == True].unit) == {f"unit{i}-00" for i in (0, 1, 2, 4, 5, 6)}  # noqa: E712
    with (out / "proposal.csv").open(newline="") as file:
        kept = {row["unit"]: row["keep"] for row in csv.DictReader(file)}
    assert kept == {f"unit{i}-00": "no" if i == 3 else "yes" for i in range(7)}, "3 was enlarged, 7 is alone"
    assert sorted(path.name for path in (out / "sheets").iterdir()) == ["001.png", "002.png"]
    page = (out / "index.html").read_text()
    assert all(f"p{i}.png" in page for i in range(7))


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_confirmed_faces_become_albums(out: Path, delimiter: str) -> None:
    edit(out, {"unit1-00": {"name": " Grandma "}, "unit2-00": {"keep": "no"}, "unit3-00": {"keep": "yes"}}, delimiter)
    folders = write_albums(out, read_confirmed(out))
    assert set(folders) == {"Grandma"}
    assert {path.stem for path in folders["Grandma"].iterdir()} == {"unit0-00", "unit1-00", "unit3-00"}
    names = dict(zip(*(read_people(out)[column].to_pylist() for column in ("unit", "name")), strict=True))
    assert [names[f"unit{i}-00"] for i in (0, 3, 4, 7)] == ["Grandma", "Grandma", None, None]


def test_clusters_with_one_name_are_one_person(out: Path) -> None:
    edit(out, {"unit1-00": {"name": "Ann"}, "unit5-00": {"name": "Ann"}})
    folders = write_albums(out, read_confirmed(out))
    assert len(list(folders["Ann"].iterdir())) == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "No cluster has a name"),
        ({"unit0-00": {"name": "Ann"}, "unit1-00": {"name": "Bob"}}, "is named both"),
        ({"unit0-00": {"name": "../Ann"}}, "Expected a name"),
        ({"unit0-00": {"name": "Ann", "keep": "perhaps"}}, "yes or no"),
        ({f"unit{i}-00": {"name": "Ann", "keep": "no"} for i in (0, 1)}, "fewer are kept"),
    ],
)
def test_what_cannot_be_confirmed_is_refused(out: Path, changes: dict[str, dict[str, str]], said: str) -> None:
    edit(out, changes)
    with pytest.raises(UserError, match=said):
        write_albums(out, read_confirmed(out))
    assert not (out / "albums").exists()


def test_what_was_written_follows_the_faces(out: Path) -> None:
    edit(out, {"unit5-00": {"name": "Bob"}, "unit6-00": {"keep": "no"}})
    rows = pq.read_table(out / PARTS / "key.parquet").to_pylist()
    fewer = [row for row in rows if row["unit"] not in ("unit0-00", "unit1-00")]  # Bob's cluster is now the largest
    write_proposal(group_faces(fewer, out, min_similarity=0.9), out)
    with (out / "proposal.csv").open(newline="") as file:
        written = {row["unit"]: (row["cluster"], row["name"], row["keep"]) for row in csv.DictReader(file)}
    assert written["unit5-00"] == ("1", "Bob", "yes")
    assert written["unit6-00"] == ("1", "Bob", "no")


def test_a_forgotten_person_leaves_no_trace_in_the_proposal(out: Path) -> None:
    edit(out, {"unit1-00": {"name": "Ann"}})
    write_albums(out, read_confirmed(out))
    assert forget_in_proposal(out, "Ann") == 4
    assert not (out / "albums" / "Ann").exists()
    for path in (out / "people.parquet", out / PARTS / "key.parquet"):
        rows = pq.read_table(path).to_pylist()
        assert not {f"unit{i}-00" for i in range(4)} & {row["unit"] for row in rows}
        assert len(rows) == 5
    everything = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert b"Ann" not in everything
    assert b"unit0-00" not in everything
    assert not crop_file(out, "unit0-00").exists()
    assert crop_file(out, "unit4-00").exists()
    assert forget_in_proposal(out, "Ann") == 0


# ------------------------------------------------------------------------------------------------ runs


def write_run(run: Path) -> None:
    for path in (run / "manifest.parquet", run / ".rgcp" / "parts" / "key.parquet"):
        schema = pa.schema(
            [
                *((name, pa.string()) for name in ("unit", "person", "review")),
                *((name, pa.float64()) for name in ("person_similarity", "identity_album_dlib", "psnr")),
            ],
            {"schema_version": "1"},
        )
        rows = [
            ("a", "Ann", "taken for Ann, not Annie", 0.97, 0.9, 30.0),
            ("b", "Bob", None, 0.96, 0.8, 31.0),
            ("c", None, None, 0.5, None, None),
        ]
        write_table(pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema), path)
    for unit in "ab":
        (run / "faces" / unit).mkdir(parents=True)
        (run / "faces" / unit / "constrained.delta").write_bytes(b"weights")
    (run / "run.json").write_text('{"command": ["rgcp", "--person", "Ann", "Annapolis"], "person": "auto"}')


def test_a_forgotten_person_is_blanked_in_a_run(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert forget_in_run(tmp_path, "Ann") == 1
    for path in (tmp_path / "manifest.parquet", tmp_path / ".rgcp" / "parts" / "key.parquet"):
        table = pq.read_table(path)
        assert table["person"].to_pylist() == [None, "Bob", None]
        assert table["person_similarity"].to_pylist() == [None, 0.96, 0.5]
        assert table["identity_album_dlib"].to_pylist() == [None, 0.8, None]
        assert table["psnr"].to_pylist() == [30.0, 31.0, None]
        assert table["review"].to_pylist() == ["taken for (forgotten), not Annie", None, None]
        assert table.schema.metadata[b"schema_version"] == b"1"
    text = (tmp_path / "run.json").read_text()
    assert '"Ann"' not in text
    assert "Annapolis" in text
    assert [unit for unit in "ab" if (tmp_path / "faces" / unit / "constrained.delta").exists()] == ["b"]


def test_in_a_run_for_one_person_all_similarities_are_that_persons(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "run.json").write_text('{"person": "Ann"}')
    forget_in_run(tmp_path, "Ann")
    assert pq.read_table(tmp_path / "manifest.parquet")["person_similarity"].null_count == 3
    assert "Ann" not in (tmp_path / "run.json").read_text()


def test_only_whom_somebody_knows_can_be_forgotten(tmp_path: Path) -> None:
    run, people_dir = tmp_path / "run", tmp_path / "people"
    (people_dir / "Bob").mkdir(parents=True)
    (people_dir / "Bob" / "card.json").write_text("{}")
    write_run(run)
    with pytest.raises(UserError, match="known: Bob"):
        forget_person(people_dir, "Eve", [], [])
    with pytest.raises(UserError, match="nothing was removed"):
        forget_person(people_dir, "Eve", [], [run])
    with pytest.raises(UserError, match="no folder of a run"):
        forget_person(people_dir, "Bob", [], [people_dir])
    assert (people_dir / "Bob").exists(), "nothing is removed by a call that is refused"
    with pytest.raises(UserError, match="Expected a name"):
        forget_person(people_dir, "../run", [], [])
    removed = forget_person(people_dir, "Bob", [], [run])
    assert len(removed) == 2
    assert not (people_dir / "Bob").exists()
