"""Run the archive flow from a terminal: a Prefect API for its time, quiet logs, a summary at the end."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# The terminal gets a bar and a summary; Prefect's log goes to its UI. Must be set before prefect is imported.
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "40")
warnings.filterwarnings("ignore", category=DeprecationWarning)

from flows.archive import Outcome, archive, prepare  # noqa: E402
from flows.server import prefect_api, wait_until_recorded  # noqa: E402

MANY_PATHS = 100


def run_archive(paths: list[str], out: Path, console: Console, **options: Any) -> dict[str, int]:
    """Restore ``paths`` into ``out`` and say how it went; return the manifest's counts by status."""
    checked = {name: value for name, value in options.items() if name not in ("chunk",)}
    prepare(paths, str(out), **checked)  # a wrong call should not wait for a server
    if len(paths) > MANY_PATHS:  # more than a flow's parameters can hold
        listing = out / ".rgcp" / "inputs.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("\n".join(str(Path(path).absolute()) for path in paths), encoding="utf-8")
        paths = [f"@{listing}"]
    with prefect_api():
        state = archive(paths, str(out), **options, command=["rgcp", *sys.argv[1:]], return_state=True)
        outcome: Outcome = state.result()
        flow_run_id = state.state_details.flow_run_id
        if flow_run_id is not None:
            known = wait_until_recorded(flow_run_id, outcome.task_runs)
            if known < outcome.task_runs:
                console.print(f"The Prefect API knows {known} of {outcome.task_runs} task runs.")
    print_summary(outcome, out, console)
    return outcome.counts


def print_summary(outcome: Outcome, out: Path, console: Console) -> None:
    """What became of the photos, and where to look."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for kind, label in {
        "photos": "photos",
        "restored": "faces restored",
        "no_face": "photos without a face",
        "skipped": "faces left as they were",
        "failed": "photos or faces that failed",
    }.items():
        if outcome.counts.get(kind) or kind in ("photos", "restored"):
            table.add_row(label, str(outcome.counts.get(kind, 0)))
    console.print(table)
    for label, path in (
        ("Photos", out / "photos"),
        ("Report", outcome.report),
        ("Table", out / "manifest.parquet"),
    ):
        console.print(f"{label + ':':8} {path}", soft_wrap=True)
