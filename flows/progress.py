"""How far a run is: a bar in the terminal; progress, counts and failures as artifacts in the Prefect UI."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pyarrow.parquet as pq
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.exceptions import PrefectException
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from flows.inputs import Chunk
from rgcp_core.manifest import PARTS
from tasks.events import listen

TABLE_SECONDS = 30.0  # between two tables in the UI
QUIET_SECONDS = 300.0  # how long an API that was lost is left alone: a call to it takes a minute to give up
MOST_FAILURES = 500  # rows in the UI; the manifest has them all

# Share of a face's time in each stage, as measured for `fast` on a CPU; only the smoothness of the bar hangs on it.
STAGE_SHARES = {"album": 0.2, "constrain": 0.75, "restore": 0.05}


_lost_at = float("-inf")


def to_ui(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Do something for the UI alone. An API that cannot be reached costs the page its news, not the run its work."""
    global _lost_at
    if time.monotonic() - _lost_at < QUIET_SECONDS:
        return None
    try:
        return call(*arguments, **named)
    except (httpx.HTTPError, PrefectException, OSError, RuntimeError) as error:
        _lost_at = time.monotonic()
        logging.getLogger("rgcp").warning("The Prefect API does not answer (%r); the run goes on.", error)
        return None


@contextmanager
def stage_bar(unit: str) -> Iterator[None]:
    """A bar in the terminal for each stage that the tasks of this process tell of one unit."""
    stages: dict[str, Any] = {}
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=Console(stderr=True)
    ) as bar:

        def show(told: str, stage: str, fraction: float) -> None:
            if told == unit:
                if stage not in stages:
                    stages[stage] = bar.add_task(stage, total=1.0)
                bar.update(stages[stage], completed=fraction)

        stop_listening = listen(show)
        try:
            yield
        finally:
            stop_listening()


class RunProgress:
    """Counts photos and faces; photos under way count by how far their faces are."""

    def __init__(self, photos: int, out: Path) -> None:
        self.out = out
        self.photos = photos
        self.photos_done = 0
        self.photos_under_way = 0
        self.counts: dict[str, int] = {}
        self._work: dict[str, dict[str, float]] = {}
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[photos]}/{task.total:.0f} photos, {task.fields[faces]} faces restored"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
        )
        self._bar_task = self._bar.add_task("Restoring", total=max(photos, 1), photos=0, faces=0)
        self._artifact: Any = None
        self._failures: list[dict[str, Any]] = []
        self._tables_at = time.monotonic()

    def __enter__(self) -> Self:
        """Show the bar and listen to the tasks of this process."""
        self._artifact = to_ui(create_progress_artifact, 0.0, key="progress", description="Photos done")
        self._stop_listening = listen(self._on_event)
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the bar where it is."""
        self._stop_listening()
        self._bar.stop()

    def begin(self, chunk: Chunk) -> None:
        """A chunk of photos is under way."""
        self.photos_under_way += len(chunk.photos)

    def finish(self, chunk: Chunk, counts: dict[str, int], *, under_way: bool = True) -> None:
        """A chunk is done, with so many rows of each status; one of an earlier run was never under way."""
        self.photos_done += len(chunk.photos)
        if under_way:
            self.photos_under_way -= len(chunk.photos)
        for kind, number in counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + number
        if counts.get("failed") and len(self._failures) < MOST_FAILURES:
            self._failures += failures(self.out, chunk.key)
        if self.photos_under_way == 0:
            self._work.clear()
        self._show()
        if not under_way:
            return
        if self._artifact is not None:
            to_ui(update_progress_artifact, self._artifact, 100.0 * self.photos_done / max(self.photos, 1))
        if time.monotonic() - self._tables_at > TABLE_SECONDS:
            self.tables()

    def tables(self) -> None:
        """Tables in the UI: what became of the photos so far, and where something failed."""
        self._tables_at = time.monotonic()
        rows: list[dict[str, Any]] = []
        for kind, label in LABELS.items():
            rows.append({"what": label, "count": self.counts.get(kind, 0)})
        to_ui(create_table_artifact, rows, key="result", description=f"Into `{self.out}`")
        if self._failures:
            to_ui(
                create_table_artifact,
                self._failures[:MOST_FAILURES],
                key="failures",
                description=f"What failed; photo and unit name its row in `{self.out / 'manifest.parquet'}`",
            )

    def _on_event(self, unit: str, stage: str, fraction: float) -> None:
        self._work.setdefault(unit, {})[stage] = fraction
        self._show()

    def _show(self) -> None:
        work = [sum(STAGE_SHARES.get(stage, 0) * f for stage, f in stages.items()) for stages in self._work.values()]
        under_way = self.photos_under_way * sum(work) / len(work) if work else 0.0
        restored_now = sum(stages.get("restore") == 1.0 for stages in self._work.values())
        self._bar.update(
            self._bar_task,
            completed=self.photos_done + 0.99 * under_way,
            photos=self.photos_done,
            faces=max(self.counts.get("restored", 0), restored_now),
        )


LABELS = {
    "photos": "photos",
    "restored": "faces restored",
    "no_face": "photos without a face",
    "skipped": "faces left as they were",
    "failed": "photos or faces that failed",
}
"""What the kinds of the manifest's rows are called."""


def failures(out: Path, key: str) -> list[dict[str, Any]]:
    """The failed rows of a chunk: what and why, and the place in the report."""
    columns = ["photo", "unit", "status", "reason"]
    rows = pq.read_table(out / PARTS / f"{key}.parquet", columns=columns).to_pylist()
    return [
        {
            "photo": row["photo"],
            "why": row["status"].removeprefix("failed:"),
            "unit": row["unit"] or "",
            "report": f"report.html#unit-{row['unit']}" if row["unit"] else "report.html",
            "reason": row["reason"],
        }
        for row in rows
        if row["status"].startswith("failed")
    ]
