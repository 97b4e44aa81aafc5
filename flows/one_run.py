"""One run at a time works on a folder; the next one tidies up after one that was killed."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.states import Crashed

from flows.progress import to_ui
from rgcp_core.errors import UserError
from rgcp_core.images import write_atomically

INTERNAL = ".rgcp"


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Refuse to work on a folder that another run is working on; the lock ends with the process, however it ends."""
    folder = out / INTERNAL
    folder.mkdir(parents=True, exist_ok=True)
    lock, note = FileLock(folder / "lock", blocking=False), folder / "running.json"
    try:
        lock.acquire()
    except Timeout as error:
        other = _read(note)
        who = f" (process {other['pid']} on {other['host']})" if other else ""
        raise UserError(f"Another run is working on {out}{who}; wait for it, or choose another folder.") from error
    try:
        killed = _read(note)
        if killed:
            remove_unfinished_files(out)
            to_ui(mark_crashed, killed.get("flow_run_id"))
        own = {"pid": os.getpid(), "host": socket.gethostname(), "flow_run_id": flow_run.id}
        write_atomically(note, json.dumps(own).encode())
        yield
        remove_unfinished_files(out)  # a worker of a cluster may have been killed, and the run gone on
        note.unlink(missing_ok=True)
    finally:
        lock.release()


def _read(note: Path) -> dict[str, Any] | None:
    try:
        return json.loads(note.read_text())
    except (OSError, ValueError):
        return None


def remove_unfinished_files(out: Path) -> None:
    """Remove what a killed process left half written. Finished files have other names."""
    for name in ("photos", "faces", INTERNAL):
        for file in (out / name).rglob("*.tmp"):
            file.unlink(missing_ok=True)


def mark_crashed(flow_run_id: str | None) -> None:
    """Tell the API that a flow run is over; a killed process could not."""
    if flow_run_id is None:
        return
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run_id).state  # type: ignore[arg-type]
        if state is not None and not state.is_final():
            message = "The process was killed; the next run on the same folder found it so."
            client.set_flow_run_state(flow_run_id, Crashed(message=message), force=True)  # type: ignore[arg-type]
