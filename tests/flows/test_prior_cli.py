"""``rgcp prior`` from import to export, on a tiny network."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from flows.prior_cli import app
from flows.prior_training import prior_training, summary
from rgcp_core.checkpoints import read_state_dict
from rgcp_core.errors import UserError
from rgcp_core.prior import Prior
from tasks.prior_training import TrainingRequest

TINY = {
    "architecture": {
        "image_size": 16,
        "model_channels": 32,
        "channel_mult": (1, 1),
        "num_res_blocks": 1,
        "attention_resolutions": (8,),
        "num_head_channels": 32,
    },
    "batch_size": 2,
    "iterations": 2,
}


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """60 pictures of noise as Parquet."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(60):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
        rows.append(buffer.getvalue())
    pd.DataFrame({"image": rows}).to_parquet(tmp_path / "faces.parquet")
    pd.DataFrame({"image": rows[:2]}).to_parquet(tmp_path / "two.parquet")
    return tmp_path / "faces.parquet"


@pytest.fixture
def mine(tmp_path: Path, tiny_prior: Prior, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of priors, with one called tiny."""
    monkeypatch.setenv("RGCP_PRIORS_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("COLUMNS", "200")
    tiny_prior.save(tmp_path / "mine" / "tiny")
    return tmp_path / "mine"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_export_and_import_give_the_same_prior_back(mine: Path, tmp_path: Path) -> None:
    run("export", "tiny", "--out", tmp_path / "again.pt", "--half")
    run("import", tmp_path / "again.pt", "--name", "twin")
    one, twin = (read_state_dict(mine / name / "model.safetensors") for name in ("tiny", "twin"))
    assert list(one) == list(twin)
    assert all(one[key].equal(twin[key]) for key in one)
    listed = run("list")
    assert "tiny" in listed
    assert "twin" in listed
    assert "ffhq256" in listed
    assert json.loads(run("info", "twin").split("\n", 1)[1])["sha256"] == Prior.load("tiny").card.sha256


def test_sample_writes_a_grid(mine: Path, tmp_path: Path) -> None:
    run("sample", "tiny", "--out", tmp_path / "grid.png", "--count", 4, "--steps", 2)
    assert Image.open(tmp_path / "grid.png").size == (2 * 18 + 2, 2 * 18 + 2)


def test_evaluate_writes_what_it_measured_into_the_card(mine: Path, faces: Path, tmp_path: Path) -> None:
    run("evaluate", "tiny", "--heldout", faces, "--write-card")
    card = json.loads((mine / "tiny" / "card.json").read_text())
    assert card["detail"]["pictures"] == 60
    assert set(card["heldout_eps_mse"]) == {"50", "100", "200", "400", "600", "800"}
    with pytest.raises(UserError, match="needs 20 clean pictures"):
        run("evaluate", "tiny", "--heldout", tmp_path / "two.parquet", "--write-card")


def test_evaluate_compares_and_leaves_duplicates_out(mine: Path, faces: Path, tmp_path: Path) -> None:
    output = run("evaluate", "tiny", mine / "tiny", "--heldout", faces)
    assert "lowest error at t = none" in output  # the same prior twice: neither is better
    with pytest.raises(UserError, match="are all in the training set"):
        run("evaluate", "tiny", "--heldout", tmp_path / "two.parquet", "--train", faces)


def test_a_licence_that_is_not_accepted_stops_the_pull(mine: Path) -> None:
    with pytest.raises(UserError, match="--accept-licence"):
        run("pull", "ffhq256")


@pytest.mark.parametrize("window", ["0,0,1", "0,0,2,1", "a,b,c,d", "0.5,0,0.5,1"])
def test_unusable_crop_windows_are_refused(window: str, faces: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="crop window"):
        run("train", faces, "--config", "faces64", "--out", tmp_path / "run", "--crop-window", window)


def test_dry_run_prints_the_settings_and_writes_nothing(faces: Path, tmp_path: Path) -> None:
    command = ("train", faces, "--config", "paper-256", "--out", tmp_path / "run", "--dry-run", "--batch-size", 8)
    settings = json.loads(run(*command))
    assert (settings["batch_size"], settings["iterations"], settings["learning_rate"]) == (8, 200_000, 1e-4)
    assert not (tmp_path / "run").exists()


def test_unknown_configurations_and_settings_are_user_errors(faces: Path, tmp_path: Path) -> None:
    for config, changes, says in (("paper-1024", {}, "paper-256"), ("faces64", {"batch_size": 0}, "batch_size")):
        request = TrainingRequest(data=faces, config=config, out=tmp_path / "run", changes=changes)
        with pytest.raises(UserError, match=says):
            request.training_config()


def test_the_flow_trains_a_prior(mine: Path, faces: Path, tmp_path: Path, prefect_server: None) -> None:
    request = TrainingRequest(
        data=faces, config="faces64", out=tmp_path / "run", start_from="tiny", changes=TINY, precision="32-true"
    )
    folder = prior_training(request)
    card = Prior.load(folder).card
    assert card.training["samples_seen"] == 4
    assert card.training["started_from"]["name"] == "tiny"
    assert "| samples_seen | 4 |" in summary(card)
