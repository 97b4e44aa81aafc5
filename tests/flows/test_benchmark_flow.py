"""The benchmark flow from damaged faces to the table, and a restored photo made again from what `explain` says."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from flows.benchmark import benchmark, plan_benchmark
from flows.benchmark_cli import is_sound, mount, parse_methods
from rgcp_core.benchmark import Crops
from rgcp_core.errors import UserError
from rgcp_core.images import load_image
from rgcp_core.provenance import explain

QUICK = {"album": {"size": 2, "steps": 3}, "constrain": {"iterations": 2}, "restore": {"steps": 3}}


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Two smooth pictures, 24 px, and one that is not readable beyond its header."""
    generator = np.random.default_rng(0)
    (tmp_path / "damaged").mkdir()
    for i in range(2):
        small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((24, 24), Image.Resampling.BICUBIC).save(tmp_path / "damaged" / f"{i}.png")
    data = (tmp_path / "damaged" / "0.png").read_bytes()
    (tmp_path / "damaged" / "broken.png").write_bytes(data[: len(data) // 2])
    return tmp_path / "damaged"


def test_benchmark_from_faces_to_table(faces: Path, tmp_path: Path, tiny_prior_dir: Path, prefect_server: str) -> None:
    out = tmp_path / "out"
    outcome = benchmark(
        str(faces), str(out), clean=str(faces), methods={"other": str(faces)}, prior=str(tiny_prior_dir),
        preset="fast", settings=QUICK, framing="ffhq",
        command=["rgcp", "benchmark", "--prior", str(tiny_prior_dir)],
    )  # fmt: skip
    rows = {(row["method"], row["face"]): row for row in pq.read_table(out / "benchmark/faces.parquet").to_pylist()}
    assert len(rows) == 3 * 3  # input, rgcp, other; three faces each
    assert rows["other", "0.png"]["psnr"] == np.inf
    assert rows["rgcp", "0.png"]["status"] == "measured"
    assert rows["rgcp", "broken.png"]["status"] == "missing"
    assert rows["other", "broken.png"]["status"] == "failed:truncated"
    assert np.isfinite(rows["rgcp", "0.png"]["psnr"])
    assert not is_sound(outcome.summary)
    assert "| rgcp | measured | 2 of 3 |" in outcome.table.read_text()
    assert json.loads((out / "benchmark/metrics.json").read_text())["rgcp"]["faces_measured"] == 2

    # The inputs that were measured are those that were restored.
    crops = Crops(16, (0.195, 0.285, 0.835, 0.925), "ffhq")
    restored = out / "photos" / "1.png"
    told = explain(restored)
    assert torch.equal(crops.load(faces / "1.png"), load_image(told.faces[0].folder / "input.png"))

    # Made again by the command that explain gives, it is the same within rounding.
    assert told.command is not None
    options = list(told.command[3:])
    options[options.index("--out") + 1] = str(tmp_path / "again")
    from flows.archive import archive
    from flows.cli import parse_settings

    sets = [options[i + 1] for i, word in enumerate(options) if word == "--set"]
    assert "--aligned-ffhq" in options
    archive(
        [told.command[2]], str(tmp_path / "again"), options[options.index("--prior") + 1],
        options[options.index("--preset") + 1], int(options[options.index("--seed") + 1]), parse_settings(sets),
        framing="ffhq",
    )  # fmt: skip
    again = tmp_path / "again" / "faces" / told.faces[0].unit / "restored.png"
    first = load_image(told.faces[0].folder / "restored.png")
    assert (load_image(again) - first).abs().max() <= 2.01 / 127.5
    assert (load_image(tmp_path / "again" / "photos" / "1.png") - load_image(restored)).abs().max() <= 2.01 / 127.5


def test_wrong_inputs_are_refused_before_any_work(faces: Path, tmp_path: Path, tiny_prior_dir: Path) -> None:
    def plan(**changes: object) -> None:
        given: dict = {
            "dataset": str(faces), "clean": None, "reference": None, "album": None, "methods": None,
            "prior": str(tiny_prior_dir), "framing": "ffhq", "limit": None,
        }  # fmt: skip
        plan_benchmark(**{**given, **changes})

    plan()
    (tmp_path / "empty").mkdir()
    for changes, message in (
        ({"dataset": "nowhere"}, "No folder nowhere"),
        ({"clean": str(tmp_path / "empty")}, "None of the 0 pictures"),
        ({"reference": str(tmp_path / "empty")}, "No pictures in the reference set"),
        ({"album": str(tmp_path / "none")}, "is not a folder"),
        ({"methods": {"rgcp": str(faces)}}, "are taken"),
        ({"methods": {"x": str(tmp_path / "none")}}, "No such folder"),
        ({"prior": "none"}, "No prior 'none'"),
    ):
        with pytest.raises(UserError, match=message):
            plan(**changes)


def test_methods_are_name_and_folder() -> None:
    assert parse_methods(["GFPGAN=out/a=b", "VQFR=c"]) == {"GFPGAN": "out/a=b", "VQFR": "c"}
    for wrong in (["GFPGAN"], ["=dir"], ["A="], ["A=x", "A=y"]):
        with pytest.raises(UserError):
            parse_methods(wrong)


def test_degrade_command(tmp_path: Path) -> None:
    app = typer.Typer()
    mount(app)
    Image.new("RGB", (16, 16), (100, 150, 200)).save(tmp_path / "a.png")
    arguments = ["degrade", str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--kind", "jpeg", "--seed", "1"]
    result = CliRunner().invoke(app, [*arguments, "--set", "quality=5"])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "degradations.json").read_text())
    assert record["pictures"][0]["parameters"] == {"quality": 5}
    result = CliRunner().invoke(app, [*arguments[:-4], "--kind", "none"])
    assert isinstance(result.exception, UserError)
    assert "old_photo" in str(result.exception)
