"""The record of one face: which stage finished under which key, and what it found out.

A key is the hash of everything that decides a stage's output. A stage whose output exists under its key is done:
that is resume, cache and provenance at once.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rgcp_core.errors import RgcpError, UnitError
from rgcp_core.images import write_atomically
from tasks.job import Job

RECORD_FILE = "record.json"
ALGORITHM_VERSION = 1  # raise it when a change of the code changes pixels: every finished stage is then redone


@dataclass(frozen=True)
class Failure:
    """Why a photo or a face was not restored."""

    status: str
    """``skipped:<reason>`` or ``failed:<reason>``."""
    reason: str
    """The sentence for the report."""


@dataclass(frozen=True)
class FaceFound:
    """A face of a photo: its unit, where it is, and why it is left out if it is."""

    unit: str
    index: int
    key: str
    failure: Failure | None = None
    box: tuple[float, ...] | None = None
    landmarks: tuple[float, ...] | None = None
    score: float | None = None
    person: str | None = None
    """The known person it is, whose album restores it; None: a generative album does."""
    person_sha256: str | None = None
    """Of that person's weights."""
    person_similarity: float | None = None
    """With the nearest known person, who may be too far to be named."""


@dataclass(frozen=True)
class PhotoFound:
    """A photo and its faces, as the align task saw them."""

    photo: str
    started_at: str
    sha256: str | None = None
    output: str | None = None
    failure: Failure | None = None
    detector: str | None = None
    seconds: float = 0.0
    faces: tuple[FaceFound, ...] = ()


@dataclass
class UnitRecord:
    """The stages of one face that are done, kept as ``record.json`` in its folder."""

    folder: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "UnitRecord":
        """Read the record; an absent or unreadable one counts as empty, so that its stages are done again."""
        try:
            stages = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            stages = {}
        return cls(folder, stages)

    def done(self, stage: str, key: str, outputs: Iterable[Path] = ()) -> bool:
        """Whether ``stage`` finished under ``key`` and its outputs are still there."""
        return self.stages.get(stage, {}).get("key") == key and all(path.exists() for path in outputs)

    def finish(self, stage: str, key: str, **facts: Any) -> None:
        """Note that ``stage`` is done; its outputs must be on disk by now."""
        self.stages[stage] = {"key": key, **facts}
        text = json.dumps(self.stages, indent=1, sort_keys=True)
        write_atomically(self.folder / RECORD_FILE, text.encode())

    def fact(self, stage: str, name: str) -> Any:
        """A fact that ``stage`` noted, or None."""
        return self.stages.get(stage, {}).get(name)


def stage_key(stage: str, *inputs: Any) -> str:
    """Key of a stage's output: a hash over everything that decides it (JSON values)."""
    text = json.dumps([ALGORITHM_VERSION, stage, *inputs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def units_of(found: Iterable[PhotoFound], failures: dict[str, Failure]) -> dict[str, FaceFound]:
    """Faces to work on, each unit once, in order: those without a failure so far."""
    faces: dict[str, FaceFound] = {}
    for photo in found:
        for face in photo.faces:
            if face.failure is None and face.unit not in failures:
                faces.setdefault(face.unit, face)
    return faces


def attempt(work: Callable[[], None]) -> Failure | None:
    """Do one face's work. What goes wrong with this face alone is returned; what would stop every face is raised."""
    try:
        work()
    except UnitError as error:
        return Failure(f"failed:{error.reason}", str(error))
    except (RgcpError, OSError, MemoryError):
        raise  # settings, disk or memory: not this face's fault, and the next one would meet it too
    except Exception as error:
        return Failure("failed:unexpected", f"{type(error).__name__}: {error}")
    return None


def photo_failure(job: Job, photo: str, error: UnitError) -> Failure:
    """The failure of a photo: what is wrong with it, or that it was deleted under way."""
    if not (job.base / photo).exists():
        return Failure("failed:vanished", "The photo was there when the run began and is no longer.")
    return Failure(f"failed:{error.reason}", str(error))
