"""A finished run goes under DVC, comes back from its cache, and can be resumed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rgcp_core.errors import UserError
from tasks.version import add_to_dvc, check_versionable


def dvc(*words: str, cwd: Path) -> None:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    subprocess.run([sys.executable, "-m", "dvc", *words], cwd=cwd, check=True, capture_output=True, env=environment)


def test_a_run_is_added_and_comes_back(tmp_path: Path) -> None:
    dvc("init", "--no-scm", "--quiet", cwd=tmp_path)
    out = tmp_path / "results" / "a run"
    (out / "photos").mkdir(parents=True)
    (out / ".rgcp").mkdir()
    (out / ".rgcp" / "lock").touch()
    (out / "photos" / "a.png").write_bytes(b"first")
    (out / "run.json").write_text("{}")
    added = add_to_dvc(out)
    assert added.dvc_file == tmp_path / "results" / "a run.dvc"
    assert (added.files, added.bytes) == (2, 7)  # the lock is no result
    assert (out / ".rgcp" / "lock").exists()

    (out / "photos" / "a.png").unlink()
    dvc("checkout", "--quiet", cwd=tmp_path)
    assert (out / "photos" / "a.png").read_bytes() == b"first"


def test_a_folder_outside_of_a_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not lie in a DVC repository"):
        check_versionable(tmp_path / "out")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").touch()
    check_versionable(tmp_path / "not yet" / "there")
    with pytest.raises(UserError, match="is a DVC repository itself"):
        check_versionable(tmp_path)
