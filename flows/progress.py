"""How far a run is: a bar in the terminal and a progress artifact in the Prefect UI."""

from types import TracebackType
from typing import Self, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tasks.events import listen

# Share of a face's time in each stage, as measured for `fast` on a CPU; only the smoothness of the bar hangs on it.
STAGE_SHARES = {"album": 0.2, "constrain": 0.75, "restore": 0.05}


class RunProgress:
    """Counts photos and faces; photos under way count by how far their faces are."""

    def __init__(self, photos: int) -> None:
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
        self._artifact: UUID | None = None

    def __enter__(self) -> Self:
        """Show the bar and listen to the tasks of this process."""
        self._artifact = cast(UUID, create_progress_artifact(0.0, key="progress", description="Photos done"))
        self._stop_listening = listen(self._on_event)
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the bar where it is."""
        self._stop_listening()
        self._bar.stop()

    def begin(self, photos: int) -> None:
        """A chunk of photos is under way."""
        self.photos_under_way += photos

    def finish(self, photos: int, counts: dict[str, int], *, under_way: bool = True) -> None:
        """A chunk is done, with so many rows of each status."""
        self.photos_done += photos
        if under_way:
            self.photos_under_way -= photos
        for kind, number in counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + number
        if self.photos_under_way == 0:
            self._work.clear()
        self._show()
        if self._artifact is not None:
            update_progress_artifact(self._artifact, 100.0 * self.photos_done / max(self.photos, 1))

    def _on_event(self, unit: str, stage: str, fraction: float) -> None:
        self._work.setdefault(unit, {})[stage] = fraction
        self._show()

    def _show(self) -> None:
        work = [
            sum(STAGE_SHARES.get(stage, 0) * f for stage, f in stages.items())
            for stages in self._work.values()
        ]
        under_way = self.photos_under_way * sum(work) / len(work) if work else 0.0
        restored_now = sum(stages.get("restore") == 1.0 for stages in self._work.values())
        self._bar.update(
            self._bar_task,
            completed=self.photos_done + 0.99 * under_way,
            photos=self.photos_done,
            faces=max(self.counts.get("restored", 0), restored_now),
        )
