"""The command line as scripts use it: exit codes, messages and what it leaves behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import parse_settings
from rgcp_core.errors import UserError
from rgcp_core.manifest import read_manifest


def rgcp(*arguments: object, api: str = "http://127.0.0.1:9/api") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from flows.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"PREFECT_API_URL": api, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "best"], "Unknown preset 'best'; there are: paper, balanced, fast."),
        (["--set", "restore.noise_step=4000"], "T = 1000; got 4000"),
        (["--aligned", "--aligned-ffhq"], "Choose one of"),
    ],
)
def test_a_wrong_call_is_one_sentence_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    result = rgcp("restore", tmp_path / "in", "--out", tmp_path / "out", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_strict_fails_when_a_unit_failed(prefect_server: str, tiny_prior_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "empty.jpg").touch()
    arguments = ("restore", tmp_path / "in", "--out", tmp_path / "out", "--prior", tiny_prior_dir)
    assert rgcp(*arguments, "--strict", api=prefect_server).returncode == 3
    result = rgcp(*arguments, api=prefect_server)
    assert result.returncode == 0
    assert "report.html" in result.stderr
    assert read_manifest(tmp_path / "out").status.tolist() == ["failed:empty"]


def test_settings_are_parsed_into_groups() -> None:
    parsed = parse_settings(["album.size=8", "seed=3", "faces.detector=offline", "album.steps=null"])
    assert parsed == {"album": {"size": 8, "steps": None}, "seed": 3, "faces": {"detector": "offline"}}
    with pytest.raises(UserError, match="NAME=VALUE"):
        parse_settings(["album.size"])
    with pytest.raises(UserError, match="twice"):
        parse_settings(["album=1", "album.size=8"])
