"""Restoring parts of photos that need not be faces: the middle square, or the squares that a table names."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from flows.archive import archive, prepare
from flows.cli import chosen_framing
from flows.personal import personal
from flows.run import run_archive
from rgcp_core.errors import UnitError, UserError
from rgcp_core.faces.align import crop_face
from rgcp_core.framing import Box, centre_box, frame_box, read_boxes
from rgcp_core.images import to_uint8
from rgcp_core.manifest import read_manifest

QUICK: dict[str, Any] = {
    "preset": "fast",
    "settings": {
        "album": {"size": 2, "steps": 4},
        "constrain": {"iterations": 2},
        "faces": {"max_enlargement": 20},
    },
}


# ------------------------------------------------------------------------------------------------ squares


def test_a_square_is_cut_where_the_box_says() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    alignment = frame_box(Box(20, 10, 16, 16), (90, 60), 16)
    assert alignment.corners.tolist() == [[20, 10], [36, 10], [36, 26], [20, 26]]
    assert np.array_equal(to_uint8(crop_face(picture, alignment)), picture[10:26, 20:36])


@pytest.mark.parametrize(
    ("box", "corner", "side"),
    [
        (Box(40, 20, 20, 10), (40, 15), 20),  # the longer side, around the same centre
        (Box(0, 0, 10, 30), (0, 0), 30),  # moved inside from the left
        (Box(80, 50, 10, 4), (80, 47), 10),
        (Box(86, 40, 4, 20), (70, 40), 20),  # and from the right
        (Box(0, 20, 90, 20), (0, -15), 90),  # wider than the photo is high: nothing to move
    ],
)
def test_squares_stay_inside_the_photo_where_they_fit(box: Box, corner: tuple[float, float], side: float) -> None:
    alignment = frame_box(box, (90, 60), 16)
    np.testing.assert_allclose(alignment.corners[0], corner)
    np.testing.assert_allclose(alignment.scale * 16, side)


def test_the_middle_of_a_photo() -> None:
    assert centre_box((90, 60)) == (15, 0, 60, 60)
    assert centre_box((61, 90)) == (0, 14.5, 61, 61)


@pytest.mark.parametrize("box", [Box(-1, 0, 10, 10), Box(85, 0, 10, 10), Box(0, 55, 10, 10)])
def test_a_box_outside_the_photo_is_refused(box: Box) -> None:
    with pytest.raises(UnitError, match="90 x 60") as error:
        frame_box(box, (90, 60), 16)
    assert error.value.reason == "bad_box"


def test_a_table_of_boxes(tmp_path: Path) -> None:
    table = tmp_path / "boxes.csv"
    table.write_text("photo,x,y,width,height\na.png,1,2,3,4\nb/c d.png,0,0,9.5,9\na.png,5,6,7,8\na.png,1,2,3,4\n")
    assert read_boxes(table) == {"a.png": [(1, 2, 3, 4), (5, 6, 7, 8)], "b/c d.png": [(0, 0, 9.5, 9)]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected the columns"),
        ("photo,x,y\n", "expected the columns"),
        ("photo,x,y,width,height\na,1,2,3,4\na,1,2,x,4\n", "line 3: expected four numbers"),
        ("photo,x,y,width,height\na,1,2\n", "line 2: expected four numbers"),
        ("photo,x,y,width,height\na,1,2,0,4\n", "above 0"),
        ("photo,x,y,width,height\na,1,2,nan,4\n", "above 0"),
    ],
)
def test_what_is_no_table_of_boxes_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        read_boxes(tmp_path / "boxes.csv")


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cat, a copy of it, and a photo that is too small."""
    from skimage.data import chelsea

    folder = tmp_path_factory.mktemp("any") / "photos"
    (folder / "inner").mkdir(parents=True)
    cat = Image.fromarray(chelsea()).resize((150, 100))
    cat.save(folder / "cat.png")
    cat.save(folder / "inner" / "copy.png")
    cat.resize((15, 10)).save(folder / "small.png")
    return folder


def changed(photos: Path, out: Path, name: str) -> np.ndarray:
    """(H,W) where the restored photo differs from the original."""
    before, after = np.asarray(Image.open(photos / name)), np.asarray(Image.open(out / "photos" / name))
    assert before.shape == after.shape
    return (before != after).any(axis=-1)


def test_the_middle_of_every_photo_is_restored(
    photos: Path, tiny_prior_dir: Path, prefect_server: str, tmp_path: Path
) -> None:
    archive([str(photos)], str(tmp_path / "out"), prior=str(tiny_prior_dir), framing="centre", **QUICK)
    manifest = read_manifest(tmp_path / "out").set_index("photo")
    assert manifest.status.to_dict() == {
        "cat.png": "restored", "inner/copy.png": "restored", "small.png": "skipped:too_small"
    }  # fmt: skip
    assert list(manifest.box["cat.png"]) == [25, 0, 125, 100]
    assert manifest.identity_input_dlib.isna().all(), "a cat has no identity that a network for faces could tell"
    assert "no faces" in manifest.metrics_unavailable["cat.png"]
    assert manifest.detector.isna().all()
    difference = changed(photos, tmp_path / "out", "cat.png")
    assert not difference[:, :25].any()
    assert not difference[:, 125:].any()
    assert difference[40:60, 65:85].mean() > 0.9


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = tmp_path_factory.mktemp("boxes") / "boxes.csv"
    rows = ["cat.png,10,20,40,30", "cat.png,90,40,50,50", "cat.png,140,90,20,20", "inner/copy.png,60,0,40,40"]
    table.write_text("\n".join(["photo,x,y,width,height", *rows]) + "\n")
    return table


def test_boxes_are_restored_and_nothing_else(
    photos: Path, boxes: Path, tiny_prior_dir: Path, prefect_server: str, tmp_path: Path
) -> None:
    options = {"prior": str(tiny_prior_dir), "framing": "boxes", "boxes": str(boxes), **QUICK}
    out = tmp_path / "out"
    archive([str(photos)], str(out), **options)
    manifest = read_manifest(out)
    statuses = {
        (row.photo, None if pd.isna(row.face_index) else row.face_index): row.status for row in manifest.itertuples()
    }
    assert statuses == {
        ("cat.png", 0): "restored", ("cat.png", 1): "restored", ("cat.png", 2): "failed:bad_box",
        ("inner/copy.png", 0): "restored", ("small.png", None): "skipped:no_box",
    }  # fmt: skip
    assert manifest.unit.dropna().is_unique, "copies of a photo may have other boxes"
    inside = np.zeros((100, 150), bool)
    inside[15:55, 10:50] = inside[40:90, 90:140] = True
    difference = changed(photos, out, "cat.png")
    assert not difference[~inside].any()
    assert difference[25:45, 20:40].mean() > 0.9
    assert difference[55:75, 105:125].mean() > 0.9
    assert not changed(photos, out, "inner/copy.png")[:, :60].any()


def test_another_box_is_another_picture(
    photos: Path, tiny_prior_dir: Path, prefect_server: str, tmp_path: Path
) -> None:
    table, out = tmp_path / "boxes.csv", tmp_path / "out"
    rows = ["photo,x,y,width,height", "cat.png,10,20,40,40", "inner/copy.png,60,0,40,40"]
    options = {"prior": str(tiny_prior_dir), "framing": "boxes", "boxes": str(table), "chunk": 16, **QUICK}
    table.write_text("\n".join(rows) + "\n")
    archive([str(photos)], str(out), **options)
    assert not changed(photos, out, "inner/copy.png")[:, :60].any()
    before = (out / "photos" / "cat.png").stat().st_mtime_ns
    table.write_text("\n".join(rows).replace("copy.png,60", "copy.png,50") + "\n")
    archive([str(photos)], str(out), **options)
    assert changed(photos, out, "inner/copy.png")[10:30, 52:58].any()
    assert (out / "photos" / "cat.png").stat().st_mtime_ns == before, "its box is the same"


def test_an_album_of_a_cat_restores_the_cat(
    photos: Path, tiny_prior_dir: Path, prefect_server: str, tmp_path: Path
) -> None:
    from skimage.data import chelsea

    album, people, out = tmp_path / "album", tmp_path / "people", tmp_path / "out"
    album.mkdir()
    cat = Image.fromarray(chelsea())
    for i, left in enumerate((0, 80, 150)):  # three views that are no copies of each other
        cat.crop((left, 0, left + 300, 300)).save(album / f"{i}.png")
    options: dict[str, Any] = {"people": str(people), "prior": str(tiny_prior_dir)}
    few = {"preset": "fast", "settings": {"personal": {"iterations": 2}}}
    folder = personal(str(album), "Chelsea", framing="centre", **options, **few)
    assert len(list((folder / "album").iterdir())) == 3
    options |= {"person": "Chelsea", **QUICK}
    archive([str(photos)], str(out), framing="centre", **options)
    manifest = read_manifest(out).set_index("photo")
    assert manifest.status["cat.png"] == "restored"
    assert manifest.person["cat.png"] == "Chelsea"
    assert manifest.album_kind["cat.png"] == "personal"
    assert manifest.person_similarity.isna().all()
    with pytest.raises(UserError, match="no faces"):
        prepare([str(photos)], str(tmp_path / "faces"), framing="photos", **options)
    with pytest.raises(UserError, match="instead of auto"):
        prepare([str(photos)], str(tmp_path / "auto"), framing="centre", **{**options, "person": "auto"})


def test_wrong_calls_are_refused(photos: Path, boxes: Path, tiny_prior_dir: Path, tmp_path: Path) -> None:
    from rich.console import Console

    def run(**options: Any) -> None:
        run_archive([str(photos)], tmp_path / "out", Console(), prior=str(tiny_prior_dir), **QUICK, **options)

    with pytest.raises(UserError, match="goes with the framing boxes"):
        run(framing="boxes")
    with pytest.raises(UserError, match="goes with the framing boxes"):
        run(framing="photos", boxes=str(boxes))
    with pytest.raises(UserError, match="cannot be read"):
        run(framing="boxes", boxes=str(tmp_path / "absent.csv"))
    table = tmp_path / "typo.csv"
    table.write_text("photo,x,y,width,height\nkat.png,0,0,50,50\n")
    with pytest.raises(UserError, match="kat"):
        run(framing="boxes", boxes=str(table))


def test_options_of_the_command_line() -> None:
    table = Path("boxes.csv")
    assert chosen_framing("faces", None, False, False) == "photos"
    assert chosen_framing("any", None, False, False) == "centre"
    assert chosen_framing("any", table, False, False) == "boxes"
    for wrong in (("cats", None, False, False), ("faces", table, False, False), ("any", None, True, False)):
        with pytest.raises(UserError):
            chosen_framing(*wrong)
