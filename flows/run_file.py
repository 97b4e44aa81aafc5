"""``run.json``: what a run was asked to do, with what, and how it ended."""

import json
import subprocess
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import rgcp_core
from rgcp_core.images import write_atomically
from rgcp_core.prior import Card
from tasks.job import Job
from tasks.record import versions

RUN_FILE = "run.json"


def new_run_id() -> str:
    """A name that sorts by time and is nobody else's."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid4().hex[:6]}"


@lru_cache(maxsize=1)
def git_revision() -> str | None:
    """Revision of the checkout that this code runs from, with ``-dirty`` when it was changed; None outside of one."""
    folder = Path(rgcp_core.__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def code_version() -> str:
    """Version of this project, with the git revision where known."""
    revision = git_revision()
    return f"{rgcp_core.__version__}+{revision}" if revision else rgcp_core.__version__


def write_run_file(job: Job, card: Card, inputs: list[str], command: list[str], **facts: Any) -> None:
    """Write ``run.json`` of a run, whole or not at all; called at its start and, with its counts, at its end."""
    content = {
        "run_id": job.run_id,
        "command": command,
        "inputs": inputs,
        "base": str(job.base),
        "out": str(job.out),
        "prior_argument": job.prior,
        "preset": job.settings.preset,
        "seed": job.settings.seed,
        "framing": job.framing,
        "boxes": None if job.boxes is None else str(job.boxes),
        "person": job.person,
        "people": None if job.people is None else str(job.people),
        "settings": job.settings.model_dump(mode="json"),
        "settings_sha256": job.settings.digest(),
        "prior": card.model_dump(mode="json"),
        "versions": versions(),
        "git_revision": git_revision(),
        **facts,
    }
    write_atomically(job.out / RUN_FILE, json.dumps(content, indent=1, ensure_ascii=False).encode())
