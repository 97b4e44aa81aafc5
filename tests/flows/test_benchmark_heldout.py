"""The benchmark in small, as `dvc repro` runs it in large: held-out faces, damaged by a seed, the bundled prior.

Steps are far too few for good pictures; what is tested is that the numbers are those of the files.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from flows.benchmark import BenchmarkOutcome, benchmark
from flows.benchmark_cli import is_sound
from rgcp_core.datasets import degrade_pictures
from rgcp_core.demo_faces import shared_dir, write_demo_faces
from rgcp_core.manifest import read_manifest

FACES, SIZE = 3, 64
FEW: dict[str, Any] = {
    "precision": "float32",
    "album": {"size": 2, "steps": 2},
    "constrain": {"iterations": 1},
    "restore": {"steps": 2},
}

pytestmark = pytest.mark.skipif(
    not (shared_dir() / "data/faces/faces128-val.parquet").is_file(),
    reason="the held-out faces (../shared/data/faces, or RGCP_SHARED_DIR) are not here",
)


def run(folder: Path, out: str, **more: Any) -> BenchmarkOutcome:
    return benchmark(
        str(folder / "damaged"), str(folder / out), clean=str(folder / "clean"), preset="fast", settings=FEW,
        framing="window", device="cpu", **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clean and damaged faces, and `strangers`: clean pictures under the name of the next face."""
    root = tmp_path_factory.mktemp("heldout")
    assert write_demo_faces(root / "clean", FACES, source="shared") == "shared"
    degrade_pictures(root / "clean", root / "damaged", "old_photo", seed=0)
    names = sorted(path.name for path in (root / "clean").iterdir())
    (root / "strangers").mkdir()
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        (root / "strangers" / name).write_bytes((root / "clean" / other).read_bytes())
    return root


@pytest.fixture(scope="module")
def outcome(folder: Path, prefect_server: str) -> BenchmarkOutcome:
    methods = {"copies": str(folder / "clean"), "strangers": str(folder / "strangers")}
    return run(folder, "out", methods=methods)


@pytest.fixture(scope="module")
def rows(folder: Path, outcome: BenchmarkOutcome) -> dict[tuple[str, str], dict[str, Any]]:
    table = pq.read_table(folder / "out/benchmark/faces.parquet").to_pylist()
    return {(row["method"], row["face"]): row for row in table}


def pixels(path: Path) -> np.ndarray:
    """A picture at the prior's size, reduced by Pillow."""
    return np.asarray(Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def test_every_face_is_in_the_manifest_and_measured_by_every_method(
    folder: Path, rows: dict[tuple[str, str], dict[str, Any]], outcome: BenchmarkOutcome
) -> None:
    faces = sorted(path.name for path in (folder / "damaged").glob("*.png"))
    assert len(faces) == FACES
    manifest = read_manifest(folder / "out").set_index("photo")
    assert sorted(manifest.index) == faces
    assert set(manifest.status) <= {"restored", "skipped:identity"}  # with so few steps some may be refused
    assert outcome.counts.get("restored", 0) + outcome.counts.get("skipped", 0) == FACES
    assert set(rows) == {(method, face) for method in ("input", "rgcp", "copies", "strangers") for face in faces}
    assert {row["status"] for row in rows.values()} == {"measured"}


def test_numbers_are_those_of_the_files(folder: Path, rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    """PSNR and SSIM as scikit-image has them, of pictures that Pillow has reduced, a little otherwise than we do."""
    units = read_manifest(folder / "out").set_index("photo").unit
    for name, unit in units.items():
        clean = pixels(folder / "clean" / str(name))
        for method, path in (
            ("input", folder / "damaged" / str(name)),
            ("rgcp", folder / "out/faces" / str(unit) / "restored.png"),
        ):
            picture = pixels(path)
            similarity = structural_similarity(
                clean, picture, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
            assert rows[method, str(name)]["psnr"] == pytest.approx(peak_signal_noise_ratio(clean, picture), abs=0.1)
            assert rows[method, str(name)]["ssim"] == pytest.approx(similarity, abs=0.005)


def test_copies_of_the_clean_faces_score_perfectly(outcome: BenchmarkOutcome) -> None:
    entry = outcome.summary["methods"]["copies"]
    assert entry["metrics"]["psnr"]["infinite"] == FACES
    assert entry["metrics"]["ssim"]["mean"] == pytest.approx(1, abs=1e-9)
    assert entry["metrics"]["identity_dlib"]["mean"] == pytest.approx(1, abs=1e-6)
    if "lpips_alex" in entry["metrics"]:
        assert entry["metrics"]["lpips_alex"]["mean"] == 0
    assert entry["identity_check"] == {"result": "passed", "nearest_to_own": FACES, "n": FACES}


def test_other_people_fail(outcome: BenchmarkOutcome) -> None:
    entry = outcome.summary["methods"]["strangers"]
    assert entry["identity_check"] == {"result": "failed", "nearest_to_own": 0, "n": FACES}
    assert not is_sound(outcome.summary)
    assert "strangers: **failed**" in outcome.table.read_text(encoding="utf-8")


def test_the_same_seed_gives_the_same_numbers(
    folder: Path, outcome: BenchmarkOutcome, rows: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """A face alone, and among others: within what docs/benchmarks.md calls the same."""
    again = run(folder, "again", limit=1)
    assert again.summary["dataset"]["count"] == 1
    (name,) = read_manifest(folder / "again").photo
    measured = {row["method"]: row for row in pq.read_table(folder / "again/benchmark/faces.parquet").to_pylist()}
    for method, row in measured.items():
        before = rows[method, name]
        assert row["psnr"] == pytest.approx(before["psnr"], abs=0.1)
        for metric in ("ssim", "identity_dlib", "lpips_alex"):
            assert row[metric] == (None if before[metric] is None else pytest.approx(before[metric], abs=0.005))
    assert measured["rgcp"]["picture_sha256"] != measured["input"]["picture_sha256"]
