"""Run the archive flow from a terminal: a Prefect API for its time, quiet logs, a summary at the end."""

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

# The terminal gets a bar and a summary, or the sentence that says why it stopped; Prefect's log, with its tracebacks of
# what was raised on purpose, goes to its UI. Must be set before prefect is imported.
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # "50" would break all of it
os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
warnings.filterwarnings("ignore", category=DeprecationWarning)

import httpx  # noqa: E402

from flows.archive import Outcome, archive, check_boxes, prepare  # noqa: E402
from flows.inputs import base_folder, expand, fingerprint  # noqa: E402
from flows.progress import LABELS  # noqa: E402
from flows.runners import on_runner  # noqa: E402
from flows.server import prefect_api, wait_until_recorded  # noqa: E402
from flows.storage import find_storage  # noqa: E402
from flows.watchdog import heartbeat_tags  # noqa: E402
from rgcp_core.errors import RgcpError, UserError  # noqa: E402

MANY_PATHS = 100


def run_archive(
    paths: list[str],
    out: Path | str,
    console: Console,
    *,
    runner: str = "local",
    workers: int = 1,
    cluster: str | None = None,
    chunk: int | None = None,
    work: str | None = None,
    command: list[str] | None = None,
    **options: Any,
) -> dict[str, int]:
    """Restore ``paths`` into ``out`` and say how it went; return the manifest's counts by status.

    Args:
        paths: folders and files, or one address for fsspec.
        out: folder for the results, or an address.
        console: for the summary.
        runner: local, dask or ray; see `flows.runners`.
        workers: processes of a Dask or Ray cluster that is started for the run.
        cluster: address of a Dask or Ray cluster that is there already.
        chunk: see `archive`.
        work: local folder to work in, where there is an address; see `flows.storage`.
        command: the command line for the run's record; by default the one that is running.
        options: the arguments of `flows.archive.prepare`.

    Raises:
        RgcpError: the run stopped; the same call goes on from there.
        SystemExit: it was told to by SIGTERM (143) or SIGINT (130).
    """
    storage = find_storage(paths, str(out), work)
    folder = Path(storage.out)
    prepare(storage.paths, storage.out, **options)  # a wrong call should not wait for a server
    if options.get("boxes") and storage.source is None:
        check_boxes(Path(options["boxes"]), base_folder(expand(paths)))
    flow = on_runner(archive, runner, workers, cluster)
    if len(paths) > MANY_PATHS:  # more than a flow's parameters can hold
        listing = folder / ".rgcp" / "inputs.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("\n".join(str(Path(path).absolute()) for path in paths), encoding="utf-8")
        paths = [f"@{listing}"]
    try:
        with ending_by_sigterm(), prefect_api(), heartbeat_tags():
            state: Any = flow(
                paths,
                str(out),
                **options,
                chunk=chunk,
                workers=workers,
                work=work,
                command=command or ["rgcp", *sys.argv[1:]],
                return_state=True,
            )
            outcome: Outcome = state.result()
            flow_run_id = state.state_details.flow_run_id
            if flow_run_id is not None:
                known = wait_until_recorded(flow_run_id, outcome.task_runs)
                if known < outcome.task_runs:
                    console.print(f"The Prefect API knows {known} of {outcome.task_runs} task runs.")
    except Terminated:
        console.print("Stopped by SIGTERM; the same command goes on from here.")
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        console.print("Stopped; the same command goes on from here.")
        sys.exit(128 + signal.SIGINT)
    except httpx.HTTPError as error:
        raise RgcpError(
            f"The Prefect API was lost ({error!r}). What is restored is on disk: run the same command again."
        ) from error
    print_summary(outcome, folder, console)
    if storage.target is not None:
        console.print(f"Stored:  {storage.target.url}", soft_wrap=True)
    return outcome.counts


class Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def ending_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the run: tasks end, the flow run is reported as crashed, the lock and the server go.

    Prefect's own handler does its part first and then sends the signal again, to the handler that was there before it.
    """

    def terminate(*_: object) -> NoReturn:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # only the main thread hears signals
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def watch_archive(paths: list[str], out: Path, console: Console, seconds: float, **options: Any) -> NoReturn:
    """Run `run_archive` now and whenever the photos are others than at its last start, until a signal comes.

    What stops a run (a full disk) does not end the watch: the next look tries again.
    """
    before = None
    try:
        with ending_by_sigterm(), prefect_api():  # one API for all runs
            while True:
                inputs = expand(paths)
                now = fingerprint(base_folder(inputs), inputs)
                if now != before:
                    before = now
                    try:
                        run_archive(paths, out, console, **options)
                    except UserError:
                        raise
                    except RgcpError as error:
                        before = None
                        console.print(f"Stopped: {error} Trying again in {seconds:g} s.", markup=False, soft_wrap=True)
                    else:
                        console.print(f"Watching; the next look is in {seconds:g} s.")
                time.sleep(seconds)
    except Terminated:
        sys.exit(128 + signal.SIGTERM)


def print_summary(outcome: Outcome, out: Path, console: Console) -> None:
    """What became of the photos, and where to look."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for kind, label in LABELS.items():
        if outcome.counts.get(kind) or kind in ("photos", "restored"):
            table.add_row(label, str(outcome.counts.get(kind, 0)))
    console.print(table)
    for label, path in (
        ("Photos", out / "photos"),
        ("Report", outcome.report),
        ("Table", out / "manifest.parquet"),
    ):
        console.print(f"{label + ':':8} {path}", soft_wrap=True)
