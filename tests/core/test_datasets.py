"""Test sets by name: what is checked, what is said when they are absent, and the published numbers."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from rgcp_core.datasets import (
    PROTOCOLS,
    PUBLISHED,
    degrade_pictures,
    find_dataset,
    match_by_name,
    photo_seed,
    published,
)
from rgcp_core.degrade import degrade
from rgcp_core.errors import UserError
from rgcp_core.images import from_uint8, load_image, to_uint8

ROOT = Path(__file__).parents[2]


def write_pictures(folder: Path, names: list[str], size: tuple[int, int] = (8, 8)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number % 256, 80, 40)).save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("name", "count"), [("wider-test", 970), ("lfw-test", 1711), ("webphoto-test", 407), ("deblur-test", 67)]
)
def test_absent_protocol_says_how_many_and_where(
    name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RGCP_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError) as error:
        find_dataset(name)
    assert f"{count} pictures" in str(error.value)
    assert PROTOCOLS[name].source in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_protocol_is_found_by_name_and_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RGCP_DATA_DIR", str(tmp_path))
    write_pictures(tmp_path / "deblur-test", [f"{i:03d}.png" for i in range(67)])
    found = find_dataset("deblur-test")
    assert found.protocol is PROTOCOLS["deblur-test"]
    assert (len(found.pictures), found.total) == (67, 67)
    part = find_dataset("deblur-test", limit=5)
    assert (len(part.pictures), part.total) == (5, 67)
    assert part.sha256 != found.sha256
    (tmp_path / "deblur-test").rename(tmp_path / "Deblur-Test")
    assert find_dataset(str(tmp_path / "Deblur-Test")).sha256 == found.sha256


def test_wrong_count_is_refused(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "webphoto-test", ["a.png", "b.png"])
    with pytest.raises(UserError, match=r"has 407 pictures, but .* holds 2"):
        find_dataset(str(folder))


def test_any_folder_needs_square_readable_pictures(tmp_path: Path) -> None:
    assert find_dataset(str(write_pictures(tmp_path / "mine", ["b.png", "in/a.png"]))).pictures == (
        "b.png",
        "in/a.png",
    )
    with pytest.raises(UserError, match="9 x 8 px; a test set holds square crops"):
        find_dataset(str(write_pictures(tmp_path / "wide", ["a.png"], (9, 8))))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.png").write_text("no picture")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        find_dataset(str(tmp_path / "text"))
    with pytest.raises(UserError, match="No folder nowhere"):
        find_dataset("nowhere")


def test_names_match_without_suffixes(tmp_path: Path) -> None:
    results = write_pictures(tmp_path / "results", ["a.png", "b.jpg.png", "in/c_00.png", "other.png"])
    matches = match_by_name(["a.jpg", "b.jpg", "in/c.png", "d.png"], results)
    assert matches == {
        "a.jpg": results / "a.png",
        "b.jpg": results / "b.jpg.png",
        "in/c.png": results / "in/c_00.png",
        "d.png": None,
    }
    with pytest.raises(UserError, match="None of the 4 pictures"):
        match_by_name(["z.png"], results)
    write_pictures(results, ["a.jpg"])
    with pytest.raises(UserError, match="the same name but for their suffix"):
        match_by_name(["a.jpg"], results)


def test_published_rows_are_those_of_the_paper() -> None:
    """Against the tables of the notes on the paper, where they are at hand."""
    notes = ROOT / "../shared/paper/method.md"
    if not notes.is_file():
        pytest.skip("../shared/paper/method.md is not here")
    text = notes.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([\w() +]+?) \| ([\d./ |]+) \|$", text, flags=re.MULTILINE))
    datasets = ("wider-test", "webphoto-test", "lfw-test", "deblur-test")
    for name, ours in (("GFPGAN", "GFPGAN"), ("VQFR", "VQFR"), ("DR2 (+VQFR)", "DR2 (+VQFR)"), ("CodeFormer",) * 2):
        numbers = [float(number) for number in re.findall(r"[\d.]+", rows[name])]
        expected = {
            (d, m): numbers[2 * i + j] for i, d in enumerate(datasets) for j, m in enumerate(("fid", "musiq_koniq"))
        }
        assert expected == {
            (r.dataset, r.metric): r.value for r in PUBLISHED if r.method == ours and r.dataset in datasets
        }
    method = [
        float(n)
        for n in re.findall(r"^\| this method \| ([^\n]*)", text, flags=re.MULTILINE)[1].replace("|", " ").split()
    ]
    ours = [r.value for r in PUBLISHED if r.method == "Ding et al." and r.metric == "identity_arcface"]
    assert ours == method
    assert len(published("wider-test")) == 12


def test_degraded_pictures_can_be_made_again_from_their_record(tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    pixels = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    for name, picture in zip(("a.png", "b.png"), pixels, strict=True):
        clean.mkdir(exist_ok=True)
        Image.fromarray(picture).save(clean / name)
    record = json.loads(degrade_pictures(clean, tmp_path / "out", "blind", seed=3).read_text())
    assert (record["kind"], record["seed"]) == ("blind", 3)
    for entry, picture in zip(record["pictures"], pixels, strict=True):
        again = degrade(from_uint8(picture), "blind", entry["seed"], **entry["parameters"]).image
        assert torch.equal(load_image(tmp_path / "out" / entry["picture"]), from_uint8(to_uint8(again)))
    first, second = (entry["parameters"] for entry in record["pictures"])
    assert first != second
    assert photo_seed(3, "a.png") != photo_seed(4, "a.png")
    levels = {"sigma": 0.0}
    degrade_pictures(clean, tmp_path / "same", "gaussian_noise", 0, levels)
    assert torch.equal(load_image(tmp_path / "same" / "a.png"), load_image(clean / "a.png"))


def test_degrade_refuses_what_would_lose_pictures(tmp_path: Path) -> None:
    clean = write_pictures(tmp_path / "clean", ["a.png"])
    with pytest.raises(UserError, match="lies inside the input"):
        degrade_pictures(clean, clean / "out", "jpeg", 0)
    write_pictures(clean, ["a.jpg"])
    with pytest.raises(UserError, match=r"would become a\.png"):
        degrade_pictures(clean, tmp_path / "out", "jpeg", 0)


def modules_behind(path: Path, seen: set[Path]) -> set[Path]:
    """Files of this project that a module imports, directly or not."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.parent if node.level == 1 else path.parent.parent
            base = (
                ".".join([*package.relative_to(ROOT).parts, node.module or ""]).strip(".")
                if node.level
                else node.module
            )
            names = [str(base), *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            place = ROOT.joinpath(*name.split("."))
            for file in (place.with_suffix(".py"), place / "__init__.py"):
                if file.is_file() and file not in seen:
                    seen.add(file)
                    modules_behind(file, seen)
    return seen


def test_every_module_with_a_say_is_a_dependency_of_the_benchmark() -> None:
    """Otherwise a changed line would leave `dvc status` content."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    dependencies = [ROOT / dep for dep in stages["benchmark"]["deps"]]
    assert ROOT / "rgcp_core/sampling.py" in dependencies
    needed = {
        file
        for file in modules_behind(ROOT / "flows/benchmark.py", set())
        if file.is_relative_to(ROOT / "rgcp_core") or file.is_relative_to(ROOT / "tasks")
        if not file.is_relative_to(ROOT / "rgcp_core/report") and file.name != "__init__.py"
    }
    assert ROOT / "rgcp_core/faces/paste.py" in needed
    missing = {file for file in needed if not any(file.is_relative_to(dep) for dep in dependencies)}
    assert not missing, "name them among the deps of the stage benchmark in dvc.yaml"
    for stage in stages.values():
        for dep in stage["deps"]:
            if not dep.startswith(("data/", "results/")) and "$" not in dep:
                assert (ROOT / dep).exists(), dep
