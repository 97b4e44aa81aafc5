"""The stages of dvc.yaml in a clone, with a tiny prior: made, up to date, and stale after a change of the code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def call(*command: str, cwd: Path) -> str:
    """Run a command in the clone, with this Python as its `python`; return what it prints."""
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(cwd.parent / "site"),
        "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@t", "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@t",
    }  # fmt: skip
    environment.pop("PREFECT_API_URL", None)  # the stages start a server of their own, as on anybody's machine
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def dvc(*words: str, cwd: Path) -> str:
    return call(sys.executable, "-m", "dvc", *words, cwd=cwd)


def stale(clone: Path) -> set[str]:
    """Those of the demo's stages that `dvc status` calls changed."""
    return set(json.loads(dvc("status", "--json", "faces", "damage", "benchmark", cwd=clone)))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, tiny_prior_dir: Path) -> Path:
    """The checkout as it is, committed in a repository of its own, with the tiny prior among its priors."""
    folder = tmp_path_factory.mktemp("clone") / "rgcp"
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout, and DVC's stages live in one")
    for name in names.split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith("rgcp_core/priors/faces"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    shutil.copytree(tiny_prior_dir, folder / "rgcp_core/priors/tiny")
    call("git", "init", "--quiet", cwd=folder)
    call("git", "add", "--all", cwd=folder)
    call("git", "commit", "--quiet", "--message", "clone", cwd=folder)
    return folder


def test_the_stages_run_and_a_changed_line_makes_them_stale(clone: Path) -> None:
    dvc("exp", "run", "--quiet", "-S", "demo.prior=tiny", "-S", "demo.source=public", "-S", "demo.seed=3", cwd=clone)
    assert stale(clone) == set()

    names = {path.name for path in (clone / "data/demo/clean").glob("*.png")}
    assert names == {"collins.png", "hopper.png"}
    assert {path.name for path in (clone / "data/demo/damaged").glob("*.png")} == names
    metrics: dict[str, Any] = json.loads((clone / "results/demo/metrics.json").read_text(encoding="utf-8"))
    assert metrics["rgcp"]["faces_measured"] == metrics["input"]["faces_measured"] == 2
    assert "prior tiny, preset fast, seed 3" in (clone / "results/demo/table.md").read_text(encoding="utf-8")
    with Image.open(clone / "results/demo/plots/faces.png") as sheet:
        assert sheet.width > 200
    shown = json.loads(dvc("metrics", "show", "--json", cwd=clone))
    assert metrics in [entry.get("data") for entry in shown[""]["data"].values()]

    sampling = clone / "rgcp_core/sampling.py"
    before = sampling.read_text(encoding="utf-8")
    sampling.write_text(before + "# one line more\n", encoding="utf-8")
    assert stale(clone) == {"benchmark"}
    sampling.write_text(before, encoding="utf-8")
    damage = clone / "rgcp_core/degrade.py"
    damage.write_text(damage.read_text(encoding="utf-8") + "# one line more\n", encoding="utf-8")
    assert stale(clone) == {"damage", "benchmark"}
