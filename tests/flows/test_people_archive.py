"""The people of an archive: found, proposed, confirmed, forgotten; with the networks that really recognise faces."""

import csv
import io
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import SHARED
from photos import digests
from PIL import Image, ImageEnhance
from typer.testing import CliRunner

import flows.people_cli
from flows.cli import app
from flows.people import confirmed_albums, people_archive, prepare_people
from rgcp_core.errors import UserError
from rgcp_core.proposal import read_people

OFFLINE: dict[str, Any] = {"settings": {"faces": {"detector": "offline"}}}
PEOPLE = SHARED / "data" / "people" / "people128.parquet"


def variants(picture: Image.Image) -> list[Image.Image]:
    """One portrait as five photos: other light, turned, mirrored, another size."""
    return [
        picture,
        ImageEnhance.Brightness(picture).enhance(0.7),
        picture.rotate(8, Image.Resampling.BICUBIC),
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        picture.resize((picture.width * 3 // 4, picture.height * 3 // 4)),
    ]


@pytest.fixture(scope="module")
def archive_dir(tmp_path_factory: pytest.TempPathFactory, astronaut: np.ndarray) -> Path:
    """Two women in five photos each, one of both, a landscape, a broken file and a copy."""
    folder = tmp_path_factory.mktemp("archive") / "photos"
    (folder / "inner").mkdir(parents=True)
    collins = Image.fromarray(astronaut).crop((100, 0, 360, 260))
    hopper = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    hopper = hopper.crop((80, 40, 420, 380)).resize((260, 260))
    for i, (a, b) in enumerate(zip(variants(collins), variants(hopper), strict=True)):
        a.save(folder / f"collins {i}.png")
        b.save(folder / "inner" / f"hopper-{i}.png")
    both = Image.new("RGB", (520, 260))
    both.paste(collins.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (0, 0))
    both.paste(hopper, (260, 0))
    both.save(folder / "both.png")
    Image.new("RGB", (200, 150), (90, 120, 160)).save(folder / "sky.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "zz-copy.png").write_bytes((folder / "collins 0.png").read_bytes())
    return folder


@pytest.fixture(scope="module")
def proposal(archive_dir: Path, prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("people") / "out"
    before = digests(archive_dir)
    proposed = people_archive([str(archive_dir)], str(out), **OFFLINE)
    assert digests(archive_dir) == before, "inputs are never changed"
    assert proposed.clusters == [1, 2]
    assert proposed.counts == {"found": 13, "no_face": 1, "failed": 1}
    return out


def test_each_cluster_is_one_person(proposal: Path) -> None:
    table = read_people(proposal).to_pandas()
    faces = table[(table.status == "found") & (table.photo != "both.png")]
    for _, members in faces.groupby("cluster"):
        assert members.photo.str.contains("hopper").nunique() == 1
    assert sorted(faces.cluster.value_counts()) == [5, 5]
    assert set(table[(table.photo == "both.png")].cluster) == {1, 2}


def test_every_photo_is_accounted_for(proposal: Path, archive_dir: Path) -> None:
    table = read_people(proposal).to_pandas()
    assert set(table.photo) == {
        path.relative_to(archive_dir).as_posix() for path in archive_dir.rglob("*") if path.is_file()
    }
    status = table.groupby("photo").status.first()
    assert status["broken.jpg"] == "failed:truncated"
    assert status["sky.png"] == "no_face"
    assert Counter(status)["skipped:copy"] == 1


def test_the_page_shows_files_that_are_there(proposal: Path) -> None:
    import re
    from urllib.parse import unquote

    page = (proposal / "index.html").read_text()
    links = re.findall(r"""(?:src|href)=["']([^"'#]+)["']""", page)
    assert len(links) == 14, "twelve faces and two contact sheets"
    assert all((proposal / unquote(link)).is_file() for link in links)
    assert "inner/hopper-3.png" in page


def test_the_same_call_again_keeps_what_was_written_and_adds_new_photos(
    proposal: Path, archive_dir: Path, tmp_path: Path
) -> None:
    import shutil

    photos, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(archive_dir, photos, copy_function=shutil.copy2)
    shutil.copytree(proposal, out, copy_function=shutil.copy2)
    name_cluster(out, "hopper", "Grace", strike="inner/hopper-2.png")
    crops = {path: path.stat().st_mtime_ns for path in (out / "faces").rglob("*.png")}
    picture = Image.open(photos / "inner" / "hopper-0.png")
    ImageEnhance.Contrast(picture).enhance(1.3).save(photos / "inner" / "hopper-9.png")
    people_archive([str(photos)], str(out), **OFFLINE)
    assert crops.items() <= {path: path.stat().st_mtime_ns for path in (out / "faces").rglob("*.png")}.items()
    rows = {row["photo"]: row for row in proposal_rows(out)}
    assert rows["inner/hopper-9.png"]["name"] == "Grace"
    assert rows["inner/hopper-2.png"]["keep"] == "no"
    assert rows["collins 1.png"]["name"] == ""


def proposal_rows(out: Path) -> list[dict[str, str]]:
    with (out / "proposal.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def name_cluster(out: Path, who: str, name: str, strike: str | None = None) -> None:
    rows = proposal_rows(out)
    cluster = next(row["cluster"] for row in rows if who in row["photo"])
    for row in rows:
        if row["cluster"] == cluster:
            row["name"], row["keep"] = name, "no" if row["photo"] == strike else "yes"
    with (out / "proposal.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_those_with_a_name_are_personalized_and_can_be_forgotten(
    proposal: Path, prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    out, people = tmp_path / "out", tmp_path / "people"
    shutil.copytree(proposal, out)
    calls: list[tuple[str, str, dict[str, Any]]] = []

    def personalized(album: str, name: str, **options: Any) -> Path:
        calls.append((album, name, options))
        (people / name).mkdir(parents=True)
        (people / name / "embeddings.npy").write_bytes(b"0")
        return people / name

    monkeypatch.setattr(flows.people_cli, "run_personal", personalized)
    nobody = CliRunner().invoke(app, ["people", "confirm", str(out), "--people", str(people)])
    assert isinstance(nobody.exception, UserError)
    name_cluster(out, "hopper", "Grace", strike="both.png")
    result = CliRunner().invoke(app, ["people", "confirm", str(out), "--people", str(people), "--no-measure"])
    assert result.exception is None
    ((album, name, options),) = calls
    assert (name, options["prior"], options["framing"], options["left_out"]) == ("Grace", "faces64", "window", 0)
    hopper = {row["unit"] for row in proposal_rows(out) if "hopper" in row["photo"]}
    assert {path.stem for path in Path(album).iterdir()} == hopper
    assert all(Image.open(path).size == (64, 64) for path in Path(album).iterdir())
    assert confirmed_albums(out, people)[1] == {}, "who is known is not personalized again"

    forget = ["people", "forget", "Grace", "--people", str(people), "--proposal", str(out)]
    asked = CliRunner().invoke(app, forget, input="n\n")
    assert asked.exit_code == 1
    assert (people / "Grace").exists()
    assert isinstance(CliRunner().invoke(app, [*forget[:2], "Eve", *forget[3:], "--yes"]).exception, UserError)
    assert CliRunner().invoke(app, [*forget, "--yes"]).exit_code == 0
    assert not (people / "Grace").exists()
    left = {row["photo"] for row in pq.read_table(out / "people.parquet").to_pylist() if row["status"] == "found"}
    assert left == {"both.png", "zz-copy.png", *(f"collins {i}.png" for i in range(5))} - skipped_copy(out)
    assert {row["photo"] for row in proposal_rows(out)} == left
    people_archive_again = pq.read_table(next((out / ".rgcp" / "people").glob("*.parquet"))).to_pylist()
    assert not any("hopper" in row["photo"] for row in people_archive_again)


def skipped_copy(out: Path) -> set[str]:
    table = read_people(out).to_pandas()
    return set(table[table.status == "skipped:copy"].photo)


def test_wrong_calls_are_refused(archive_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        prepare_people([str(tmp_path / "absent")], str(tmp_path / "out"))
    with pytest.raises(UserError, match="between 0 and 1"):
        prepare_people([str(archive_dir)], str(tmp_path / "out"), min_similarity=93)
    with pytest.raises(UserError, match="framing"):
        prepare_people([str(archive_dir)], str(tmp_path / "out"), framing="centre")
    with pytest.raises(UserError, match="lies inside"):
        prepare_people([str(archive_dir)], str(archive_dir / "out"))
    absent = CliRunner().invoke(app, ["people", str(tmp_path / "absent"), "--out", str(tmp_path / "out")])
    assert isinstance(absent.exception, UserError), "a folder's name is no command"


@pytest.mark.skipif(not PEOPLE.exists(), reason="the crops of people128 are not here")
def test_real_people_are_told_apart(prefect_server: str, tmp_path: Path) -> None:
    rows = [row for row in pq.read_table(PEOPLE).to_pylist() if row["person"] in ("person05", "person07", "person09")]
    (tmp_path / "crops").mkdir()
    for i, row in enumerate(rows):
        Image.open(io.BytesIO(row["image"])).save(tmp_path / "crops" / f"{row['person']}-{i}.png")
    people_archive([str(tmp_path / "crops")], str(tmp_path / "out"), framing="window")
    table = read_people(tmp_path / "out").to_pandas()
    groups = table.groupby("cluster").photo.agg(lambda photos: sorted(photo.split("-")[0] for photo in photos))
    assert groups.tolist() == [["person07"] * 6, ["person05"] * 5, ["person09"] * 4]
