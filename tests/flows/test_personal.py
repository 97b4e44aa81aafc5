"""Personalizing on real photos with a tiny prior, restoring with it, and the identity gate."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from matplotlib.cbook import get_sample_data
from photos import digests, portrait
from PIL import Image, ImageEnhance

from flows.archive import archive, prepare
from flows.benchmark import benchmark
from flows.benchmark_cli import benchmark_command
from flows.personal import personal
from flows.personal import prepare as prepare_personal
from rgcp_core.errors import UserError
from rgcp_core.manifest import read_manifest
from rgcp_core.people import load_person
from rgcp_core.personal_album import choose_album
from rgcp_core.provenance import explain, explanation_lines

FEW: dict[str, Any] = {
    "album": {"size": 2, "steps": 2},
    "constrain": {"iterations": 1},
    "faces": {"detector": "offline", "max_enlargement": 20},
    "gate": {"person_named": 0.96},  # 16 px pictures of one portrait and of somebody else
}


def hopper() -> Image.Image:
    """The US Navy's portrait of Grace Hopper (public domain)."""
    with get_sample_data("grace_hopper.jpg") as file:
        return Image.open(file).convert("RGB").resize((256, 300))


@pytest.fixture(scope="module")
def ada(
    astronaut: np.ndarray, tiny_prior_dir: Path, prefect_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder of people with one, made from four pictures of one portrait and one of somebody else."""
    album, people = tmp_path_factory.mktemp("album"), tmp_path_factory.mktemp("known") / "people"
    picture = portrait(astronaut)
    picture.save(album / "a.png")
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(album / "flipped.png")
    ImageEnhance.Brightness(picture).enhance(0.7).save(album / "dark.png")
    picture.rotate(8, Image.Resampling.BICUBIC).save(album / "turned.jpg", quality=95)
    hopper().save(album / "somebody else.png")
    Image.new("RGB", (200, 150), (90, 120, 160)).save(album / "sky.png")
    (album / "empty.jpg").write_bytes(b"")
    before = digests(album)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rgcp_core.personal_album.COPY", 2.0)  # there is but one portrait
        patch.setattr("flows.personal.choose_album", partial(choose_album, same_person=0.96))
        patch.setattr("tasks.personal.SAMPLING_STEPS", {"fast": 2})
        changes = {**FEW, "personal": {"iterations": 2}}
        folder = personal(str(album), "Ada", str(people), str(tiny_prior_dir), "fast", settings=changes, left_out=1)
    assert digests(album) == before, "inputs are never changed"
    assert folder == people / "Ada"
    return people


def test_the_album_is_the_person_who_recurs(ada: Path) -> None:
    person = load_person(ada, "Ada")
    assert {face.photo for face in person.card.album} == {"a.png", "flipped.png", "dark.png", "turned.jpg"}
    left_out = {face.photo: face.left_out or "" for face in person.card.faces if face.left_out}
    assert set(left_out) == {"somebody else.png", "sky.png", "empty.jpg"}
    assert "another person" in left_out["somebody else.png"]
    assert "no face" in left_out["sky.png"]
    assert any("4 faces" in warning for warning in person.card.warnings)
    yaws = {face.photo: face.yaw for face in person.card.album}
    assert yaws["a.png"] == pytest.approx(-(yaws["flipped.png"] or 0), abs=0.1)
    assert (person.folder / "samples.png").is_file()
    assert "somebody else.png" in (person.folder / "index.html").read_text()


def test_the_measurement_compares_every_prior(ada: Path) -> None:
    measured = load_person(ada, "Ada").card.leave_out
    assert measured is not None
    expected = {"undamaged", "damaged", "unmodified prior", "personal album", "generative album"}
    assert set(measured["identity"]) == expected
    assert all(-1 <= value["mean"] <= 1 and value["low"] is None for value in measured["identity"].values())
    assert "1 of 4 photos" in measured["about"]


@pytest.fixture(scope="module")
def restored(
    ada: Path, astronaut: np.ndarray, tiny_prior_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A run over two people, one of them known, and its arguments but for the folder."""
    source, out = tmp_path_factory.mktemp("mixed"), tmp_path_factory.mktemp("run") / "out"
    portrait(astronaut, 230).save(source / "ada.png")
    hopper().save(source / "hopper.png")
    arguments = {"paths": [str(source)], "prior": str(tiny_prior_dir), "preset": "fast", "settings": FEW}
    arguments |= {"person": "Ada", "people": str(ada), "keep": "none"}
    archive(out=str(out), **arguments)
    return out, arguments


def test_the_named_person_gets_her_album_and_others_their_own(restored: tuple[Path, dict[str, Any]], ada: Path) -> None:
    rows = read_manifest(restored[0]).set_index("photo")
    assert set(rows.status) == {"restored"}
    assert rows.album_kind.to_dict() == {"ada.png": "personal", "hopper.png": "generative"}
    assert rows.person["ada.png"] == "Ada"
    assert pd.isna(rows.person["hopper.png"])
    assert rows.person_similarity["ada.png"] > 0.96 > rows.person_similarity["hopper.png"]
    assert (rows.album_size["ada.png"], rows.album_size["hopper.png"]) == (4, 2)
    assert rows.constrain_iterations["ada.png"] == 2
    facts = json.loads((restored[0] / "run.json").read_text())
    assert (facts["person"], facts["people"]) == ("Ada", str(ada))


def test_resuming_and_chunking_change_no_pixel(restored: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, arguments = restored
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    archive(out=str(out), **arguments)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == before
    archive(out=str(tmp_path / "again"), chunk=1, **arguments)
    assert digests(tmp_path / "again" / "photos") == digests(out / "photos")


def test_without_the_person_the_picture_is_another(restored: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, arguments = restored
    plain = {name: value for name, value in arguments.items() if name not in ("person", "people")}
    archive(out=str(tmp_path / "plain"), **plain)
    here, there = digests(out / "faces"), digests(tmp_path / "plain" / "faces")
    rows = read_manifest(out).set_index("photo")
    name = {photo: f"{rows.unit[photo]}/restored.png" for photo in rows.index}
    assert here[name["ada.png"]] != there[name["ada.png"]]
    assert here[name["hopper.png"]] == there[name["hopper.png"]]
    assert read_manifest(tmp_path / "plain").person.isna().all()


def test_a_refused_face_stays_as_it_was_and_is_to_be_looked_at(
    restored: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.gate.SMALLEST", 1)  # judge pictures of 16 px, too
    out, arguments = tmp_path / "out", dict(restored[1])
    arguments["settings"] = {**FEW, "gate": {"person_named": 0.96, "min_input": 1.0, "min_input_personal": 1.0}}
    archive(out=str(out), **arguments)
    rows = read_manifest(out)
    assert set(rows.status) == {"skipped:identity"}
    assert rows.output.isna().all()
    assert rows.reason.str.contains("It was kept as it was").all()
    assert (rows.identity_gate_dlib < 1).all()
    assert not (out / "photos").exists()
    review = pq.read_table(out / "review.parquet").to_pylist()
    assert {row["photo"] for row in review} == {"ada.png", "hopper.png"}
    assert all((out / row["restored"]).is_file() for row in review)
    report = (out / "report.html").read_text()
    assert report.index("<h2>To be looked at") < report.index("Refused: not in the photo")

    lax = {"min_input": -1.0, "min_input_personal": -1.0, "min_album": -1.0}
    arguments["settings"] = {**FEW, "gate": {"person_named": 0.96, **lax}}
    restored_before = {path: path.stat().st_mtime_ns for path in out.glob("faces/*/restored.png")}
    archive(out=str(out), **arguments)  # another limit: pasted now, restored no second time
    assert set(read_manifest(out).status) == {"restored"}
    assert {path: path.stat().st_mtime_ns for path in out.glob("faces/*/restored.png")} == restored_before
    assert len(list(out.glob("photos/*"))) == 2

    arguments["settings"] = {**FEW, "gate": {"person_named": 0.96, "min_input": 1.0, "min_input_personal": 1.0}}
    archive(out=str(out), **arguments)
    assert not list(out.glob("photos/*")), "what is refused now is not left there from before"


def test_several_candidates_keep_the_likest(
    restored: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, arguments = tmp_path / "out", dict(restored[1])
    monkeypatch.setattr("tasks.gate.SMALLEST", 1)
    gate = {"person_named": 0.96, "enabled": False}
    likeness: dict[int, dict[str, float]] = {}
    for candidates in (1, 3):
        arguments["settings"] = {**FEW, "gate": {**gate, "candidates": candidates}}
        archive(out=str(out), **arguments)
        rows = read_manifest(out).set_index("photo")
        likeness[candidates] = rows.identity_gate_dlib.to_dict()
        assert rows.candidate.between(0, candidates - 1).all()
    for photo, alone in likeness[1].items():  # the first candidate is the one drawn alone
        assert likeness[3][photo] >= alone - 1e-4


def test_a_benchmark_restores_with_the_personal_prior_and_measures_against_the_album(
    restored: tuple[Path, dict[str, Any]], ada: Path, tiny_prior_dir: Path, tmp_path: Path
) -> None:
    """The paper's Table 2: faces of one person, her prior, and identity as the mean cosine with her album."""
    (tmp_path / "faces").mkdir()
    for photo, unit in read_manifest(restored[0]).set_index("photo").unit.items():
        (tmp_path / "faces" / str(photo)).write_bytes((restored[0] / "faces" / unit / "input.png").read_bytes())
    out = tmp_path / "out"
    options: dict[str, Any] = {
        "album": str(ada / "Ada" / "album"), "prior": str(tiny_prior_dir), "preset": "fast", "settings": FEW,
        "framing": "window", "people": str(ada),
    }  # fmt: skip
    outcome = benchmark(str(tmp_path / "faces"), str(out), person="Ada", **options)
    rows = read_manifest(out).set_index("photo")
    assert rows.album_kind.to_dict() == {"ada.png": "personal", "hopper.png": "generative"}
    assert "1 faces with the personal prior of --person Ada" in outcome.table.read_text(encoding="utf-8")
    measured = pq.read_table(out / "benchmark" / "faces.parquet").to_pylist()
    identity = {row["face"]: row["identity_dlib"] for row in measured if row["method"] == "input"}
    assert identity == pytest.approx(rows.person_similarity.to_dict(), abs=1e-3)  # of when she was recognised

    told = explain(out / "photos" / "ada.png")
    assert told.command is not None
    assert "--person Ada --people" in " ".join(told.command)
    assert f"the personal one of Ada, in {ada / 'Ada'}" in "\n".join(explanation_lines(told))
    with pytest.raises(UserError, match="Nobody called 'Grace'"):
        benchmark_command(str(tmp_path / "faces"), tmp_path / "x", prior=str(tiny_prior_dir), framing="window",
                          person="Grace", people=ada)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"person": "Grace"}, "Nobody called 'Grace' is known"),
        ({"person": "auto", "people": "nowhere"}, "Nobody in .*nowhere was personalized with the prior"),
        ({"person": "Ada", "framing": "centre"}, "needs faces"),
        ({"person": "Ada", "prior": "faces64"}, "was personalized with the prior tiny"),
    ],
)
def test_wrong_people_are_refused_before_any_work(
    changes: dict[str, Any], message: str, ada: Path, tiny_prior_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    arguments: dict[str, Any] = {"prior": str(tiny_prior_dir), "preset": "fast", "people": str(ada)}
    with pytest.raises(UserError, match=message):
        prepare([str(tmp_path / "in")], str(tmp_path / "out"), **(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Ada"}, "Ada is known already"),
        ({"name": "a/b"}, "Expected a name"),
        ({"settings": {"personal": {"steps": 3}}}, "Unknown setting in personal"),
        ({"settings": {"personal": {"iterations": -1}}}, "Unusable settings"),
        ({"settings": {"personal": {"times": "below_noise_step"}}}, "must be all"),
        ({"framing": "boxes"}, "needs faces"),
        ({"album_dir": "empty"}, "There are no photos"),
    ],
)
def test_wrong_albums_are_refused_before_any_work(
    changes: dict[str, Any], message: str, ada: Path, tiny_prior_dir: Path, tmp_path: Path, astronaut: np.ndarray
) -> None:
    (tmp_path / "empty").mkdir()
    portrait(astronaut).save(tmp_path / "a.png")
    arguments: dict[str, Any] = {"album_dir": str(tmp_path), "name": "Grace", "people": str(ada), "preset": "fast"}
    arguments |= {"prior": str(tiny_prior_dir)}
    if "album_dir" in changes:
        changes = {"album_dir": str(tmp_path / "empty")}
    with pytest.raises(UserError, match=message):
        prepare_personal(**(arguments | changes))
