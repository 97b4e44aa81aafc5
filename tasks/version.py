"""Put a finished run under DVC: its files go to DVC's cache as links, a small text file stands for them in git."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from prefect import task
from prefect.cache_policies import NO_CACHE

from rgcp_core.errors import RgcpError, UserError


@dataclass(frozen=True)
class Versioned:
    """A folder that DVC knows."""

    dvc_file: Path
    """To be committed; `dvc checkout` and `dvc pull` bring back what it stands for."""
    md5: str
    files: int
    bytes: int


@task(cache_policy=NO_CACHE)
def version(out: Path) -> Versioned:
    """Add a finished run's folder to DVC; see `add_to_dvc`."""
    return add_to_dvc(out)


def check_versionable(out: Path) -> None:
    """Refuse, before any work, a folder that DVC could not take.

    Raises:
        UserError: `out` does not lie in a DVC repository, or is a whole repository itself.
    """
    root = dvc_root(out)
    if root is None:
        raise UserError(
            f"{out} does not lie in a DVC repository, so --version cannot put it under DVC. Choose an --out inside "
            "one, or make one there: git init && dvc init (without git: dvc init --no-scm)."
        )
    if root == out.resolve():
        raise UserError(f"{out} is a DVC repository itself; choose a folder inside it.")


def dvc_root(folder: Path) -> Path | None:
    """The DVC repository that a folder lies in, which need not exist yet."""
    for parent in (folder.resolve(), *folder.resolve().parents):
        if (parent / ".dvc" / "config").is_file():
            return parent
    return None


def add_to_dvc(out: Path) -> Versioned:
    """Run `dvc add`, waiting for another DVC command to end; `.rgcp` is left out by `.dvcignore`.

    Raises:
        UserError: as `check_versionable`.
        RgcpError: DVC failed; its own words are in the message.
    """
    check_versionable(out)
    _leave_out_working_files(dvc_root(out) or out)
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "add", "--quiet", out.name]
    done = subprocess.run(command, cwd=out.resolve().parent, capture_output=True, text=True)
    if done.returncode != 0:
        raise RgcpError(
            f"The run is finished, but DVC could not add {out}: {done.stderr.strip() or done.stdout.strip()}"
        )
    dvc_file = out.with_name(f"{out.name}.dvc")
    entry = yaml.safe_load(dvc_file.read_text(encoding="utf-8"))["outs"][0]
    return Versioned(dvc_file, entry["md5"], entry["nfiles"], entry["size"])


def _leave_out_working_files(root: Path) -> None:
    """Locks and unfinished work are not results: name them in `.dvcignore`, where that has not been done."""
    ignore = root / ".dvcignore"
    lines = ignore.read_text(encoding="utf-8").splitlines() if ignore.is_file() else []
    if ".rgcp/" not in lines:
        ignore.write_text("\n".join([*lines, ".rgcp/"]) + "\n", encoding="utf-8")
