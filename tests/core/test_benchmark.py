"""Benchmarks on pictures whose scores are known: copies of the clean ones, and those of somebody else."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rgcp_core.benchmark import Crops, References, distances, identity_check, load_features, measure_method, summarise
from rgcp_core.benchmark_page import markdown_table, write_results
from rgcp_core.datasets import degrade_pictures, published
from rgcp_core.demo_faces import write_demo_faces
from rgcp_core.errors import UnitError
from rgcp_core.metrics.distribution import FeatureExtractor
from rgcp_core.prior import Prior

WINDOW = (0.195, 0.285, 0.835, 0.925)
CROPS = Crops(64, WINDOW, "window")
NAMES = ("collins.png", "hopper.png")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_prior: Prior) -> dict[str, Path]:
    """Two public-domain faces: clean, damaged, and swapped."""
    root = tmp_path_factory.mktemp("benchmark")
    tiny_prior.save(root / "prior")
    write_demo_faces(root / "clean", 2, str(root / "prior"), source="public")
    degrade_pictures(root / "clean", root / "damaged", "old_photo", seed=0)
    (root / "swapped").mkdir()
    for name, other in zip(NAMES, reversed(NAMES), strict=True):
        (root / "swapped" / name).write_bytes((root / "clean" / other).read_bytes())
    return {name: root / name for name in ("clean", "damaged", "swapped")}


def pictures(folder: Path) -> dict[str, Path | None]:
    return {name: folder / name for name in NAMES}


def references(folders: dict[str, Path]) -> References:
    return References({name: folders["damaged"] / name for name in NAMES}, pictures(folders["clean"]))


@pytest.fixture(scope="module")
def summary(folders: dict[str, Path]) -> dict:
    import pyarrow as pa

    tables = [
        measure_method(name, pictures(folders[folder]), references(folders), CROPS)
        for name, folder in (("input", "damaged"), ("rgcp", "damaged"), ("copies", "clean"), ("swapped", "swapped"))
    ]
    faces = pa.concat_tables(tables)
    run = {
        "prior": "none", "preset": "fast", "seed": 0, "framing": "window", "size": 64, "restored": True,
        "code_version": "0",
    }  # fmt: skip
    dataset = {"name": "d", "title": "D", "about": "", "count": 2, "total": 2, "sha256": "0" * 64}
    return {
        "faces": faces,
        "summary": {"dataset": dataset, "run": run, **summarise(faces), "distances": {}, "distances_unavailable": {}},
    }


def test_copies_of_the_clean_pictures_score_perfectly(summary: dict) -> None:
    entry = summary["summary"]["methods"]["copies"]
    metrics = entry["metrics"]
    assert metrics["psnr"] == {"mean": None, "low": None, "high": None, "n": 2, "infinite": 2}
    assert metrics["ssim"]["mean"] == pytest.approx(1, abs=1e-9)
    assert metrics["identity_dlib"]["mean"] == pytest.approx(1, abs=1e-6)
    if "lpips_alex" in metrics:
        assert metrics["lpips_alex"]["mean"] == 0
    assert entry["identity_check"] == {"result": "passed", "nearest_to_own": 2, "n": 2}
    psnr = summary["faces"].to_pandas().query("method == 'copies'")["psnr"]
    assert np.isposinf(psnr).all()


def test_wrong_identities_fail(summary: dict) -> None:
    methods = summary["summary"]["methods"]
    assert methods["swapped"]["identity_check"] == {"result": "failed", "nearest_to_own": 0, "n": 2}
    assert methods["swapped"]["metrics"]["identity_dlib"]["mean"] < methods["input"]["metrics"]["identity_dlib"]["mean"]
    assert methods["input"]["identity_check"]["result"] == "passed"


def test_a_method_equal_to_ours_differs_by_nothing(summary: dict) -> None:
    """`rgcp` is given the inputs themselves here."""
    difference = summary["summary"]["differences"]["input"]
    assert {name: (e["mean"], e["low"], e["high"]) for name, e in difference.items()}.items() >= {
        "psnr": (0, 0, 0),
        "ssim": (0, 0, 0),
    }.items()
    assert summary["summary"]["differences"]["copies"]["psnr"]["mean"] is None


def test_identity_check_needs_more_than_chance() -> None:
    assert identity_check([1])["result"] is None
    assert identity_check([1, 2])["result"] == "failed"  # by chance one of any set is nearest to its own
    assert identity_check([1, 1, 2])["result"] == "passed"
    assert identity_check([1, 1, 2, 2])["result"] == "failed"


def test_every_face_has_a_row(folders: dict[str, Path], tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    Image.new("RGB", (20, 10)).save(wide)
    table = measure_method("m", {"collins.png": wide, "hopper.png": None}, references(folders), CROPS)
    rows = {row["face"]: row for row in table.to_pylist()}
    assert rows["collins.png"]["status"] == "failed:not_square"
    assert "20 x 10" in rows["collins.png"]["reason"]
    assert rows["hopper.png"]["status"] == "missing"
    assert rows["hopper.png"]["psnr"] is None
    entry = summarise(table)["methods"]["m"]
    assert (entry["faces"], entry["measured"], entry["metrics"]) == (2, 0, {})


def test_ffhq_squares_are_cut_to_the_window(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "square.png")
    crop = Crops(50, (0.25, 0.2, 0.75, 0.7), "ffhq").load(tmp_path / "square.png")
    assert torch.equal(((crop + 1) * 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(pixels[20:70, 25:75]))
    whole = Crops(100, (0.25, 0.2, 0.75, 0.7), "window").load(tmp_path / "square.png")
    assert torch.equal(((whole + 1) * 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(pixels))


def test_larger_results_are_averaged_down_not_sampled(tmp_path: Path) -> None:
    """A checkerboard of single pixels has the mean gray at half its size; every other pixel would be black or white."""
    board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(np.repeat(board[..., None], 3, axis=2)).save(tmp_path / "board.png")
    crop = Crops(64, WINDOW, "window").load(tmp_path / "board.png")
    assert crop[:, 8:-8, 8:-8].abs().max() < 0.06


def test_a_crop_that_is_not_square_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "wide.png")
    with pytest.raises(UnitError, match="20 x 10"):
        CROPS.load(tmp_path / "wide.png")


def test_distances_carry_what_they_depend_on(folders: dict[str, Path]) -> None:
    """On features of a stub they are not called FID; a set against itself has distance 0."""
    stub = FeatureExtractor("stub", "none", lambda images: images.mean(dim=(2, 3)))
    features = load_features([folders["clean"] / name for name in NAMES], CROPS, stub)
    result = distances(features, features)
    assert set(result) == {"frechet_stub", "kernel_stub"}
    assert result["frechet_stub"]["mean"] == pytest.approx(0, abs=1e-6)
    assert result["frechet_stub"]["reference_sha256"] == features.sha256
    assert (result["frechet_stub"]["n"], result["frechet_stub"]["reference_count"]) == (2, 2)


def test_results_are_written_and_labelled(summary: dict, folders: dict[str, Path], tmp_path: Path) -> None:
    columns = {"input": (pictures(folders["damaged"]), CROPS), "none": ({NAMES[0]: None}, CROPS)}
    rows = published("wider-test")
    table = write_results(tmp_path / "out", summary["faces"], summary["summary"], rows, columns).read_text()
    assert "| copies | measured | 2 of 2 | ∞ (2 of 2) |" in table
    assert "| CodeFormer | published |" in table
    assert "48.57" in table
    assert "do not compare" in table  # measured at 64 px, published at 256
    assert "swapped: **failed**" in table
    names = pq.read_table(tmp_path / "out" / "faces.parquet").column("method").to_pylist()
    assert names == ["input"] * 2 + ["rgcp"] * 2 + ["copies"] * 2 + ["swapped"] * 2

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    means = json.loads((tmp_path / "out" / "metrics.json").read_text(), parse_constant=refuse)
    assert "psnr" not in means["copies"]
    assert means["copies"]["ssim"] == 1
    assert all(math.isfinite(value) for entry in means.values() for value in entry.values())
    json.loads((tmp_path / "out" / "summary.json").read_text(), parse_constant=refuse)
    for plot in ("intervals.png", "faces.png"):
        assert Image.open(tmp_path / "out" / "plots" / plot).size[0] > 200


def test_a_part_of_a_set_does_not_claim_to_compare(summary: dict) -> None:
    part = {**summary["summary"], "run": {**summary["summary"]["run"], "size": 256}}
    assert "do not compare" not in markdown_table(part, published("wider-test"))
    part["dataset"] = {**part["dataset"], "total": 970}
    assert "do not compare" in markdown_table(part, published("wider-test"))
