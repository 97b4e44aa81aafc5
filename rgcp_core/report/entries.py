"""One row of the manifest as the report shows it: links to the files that exist, numbers with their unit."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from rgcp_core.manifest import METRICS, SCHEMA

KINDS = ("failed", "restored", "skipped", "no_face")
"""What a status begins with, in the order of the report."""
REVIEW = "review"
"""The section before all of these: faces that somebody should look at, whatever became of them."""

STAGES = ("align", "album", "constrain", "restore", "paste")
COLUMNS = [
    *("photo", "unit", "face_index", "status", "reason", "output", "prior", "preset", "seed", "noise_step"),
    *("album_size", "constrain_iterations", "device", "peak_memory_bytes", "started_at", "finished_at"),
    *(f"seconds_{stage}" for stage in STAGES),
    *METRICS,
    *("metrics_unavailable", "person", "person_similarity", "album_kind", "review"),
]

_LABELS = {
    "psnr": ("PSNR", "{:.1f} dB"),
    "ssim": ("SSIM", "{:.3f}"),
    "lpips_alex": ("LPIPS", "{:.3f}"),
    "identity_dlib": ("Identity, dlib", "{:.3f}"),
    "identity_arcface": ("Identity, ArcFace", "{:.3f}"),
    "identity_input_dlib": ("Like the input, dlib", "{:.3f}"),
    "identity_input_arcface": ("Like the input, ArcFace", "{:.3f}"),
    "niqe": ("NIQE", "{:.2f}"),
    "musiq_koniq": ("MUSIQ", "{:.1f}"),
    "album_spread": ("Album spread", "{:.3f}"),
    "identity_gate_dlib": ("Same person, at the input's sharpness", "{:.3f}"),
    "identity_album_dlib": ("Like the album", "{:.3f}"),
    "person_similarity": ("Input like the known person", "{:.3f}"),
}


@dataclass(frozen=True)
class Metric:
    """A number that was measured, and what it says."""

    label: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Entry:
    """What the template needs of one row. Files are URLs relative to the report, None where there is none."""

    anchor: str
    section: str
    kind: str
    status: str
    photo: str
    folder: str
    name: str
    photo_url: str | None
    unit: str | None
    face: int | None
    reason: str | None
    input_url: str | None
    restored_url: str | None
    mean_url: str | None
    variance_url: str | None
    album_urls: list[str]
    metrics: list[Metric]
    made: str
    unmeasured: str | None
    person: str | None
    review: str | None


def kind_of(row: dict[str, Any]) -> str:
    """One of `KINDS`: the status without its reason."""
    return str(row["status"]).partition(":")[0]


def section_of(row: dict[str, Any]) -> str:
    """Where the report shows a row: among those to look at, or with its kind."""
    return REVIEW if row["review"] is not None else kind_of(row)


def anchors(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The id of each row in the report: `unit-<unit>`, or `photo-<hash of its path>` for a whole photo.

    The second of two equal ones (the same photo twice in an archive) gets a mark, as ids must differ.
    """
    found: dict[str, None] = {}
    for row in rows:
        path_hash = hashlib.sha256(row["photo"].encode()).hexdigest()[:16]
        anchor = f"unit-{row['unit']}" if row["unit"] else f"photo-{path_hash}"
        while anchor in found:
            anchor += "_"
        found[anchor] = None
    return list(found)


def entry(row: dict[str, Any], anchor: str, run_dir: Path) -> Entry:
    """Look up what files there are for a row (a dict of `COLUMNS`) and put its facts into words."""
    path = PurePosixPath(row["photo"])
    files = _files(run_dir, f"faces/{row['unit']}") if row["unit"] else {}
    output = row["output"]
    return Entry(
        anchor=anchor,
        section=section_of(row),
        kind=kind_of(row),
        status=row["status"],
        photo=row["photo"],
        folder="" if path.parent == PurePosixPath(".") else f"{path.parent}/",
        name=path.name,
        photo_url=quote(output) if output and (run_dir / output).is_file() else None,
        unit=row["unit"],
        face=None if row["face_index"] is None else row["face_index"] + 1,
        reason=row["reason"],
        input_url=files.get("input.png"),
        restored_url=files.get("restored.png"),
        mean_url=files.get("mean.png"),
        variance_url=files.get("variance.png"),
        album_urls=list(_files(run_dir, f"faces/{row['unit']}/album").values()) if "album" in files else [],
        metrics=[
            Metric(label, pattern.format(row[name]), SCHEMA.field(name).metadata[b"description"].decode())
            for name, (label, pattern) in _LABELS.items()
            if row[name] is not None
        ],
        made=_made(row),
        unmeasured=row["metrics_unavailable"],
        person=row["person"],
        review=row["review"],
    )


def _files(run_dir: Path, folder: str) -> dict[str, str]:
    """Name -> URL of what is in a folder of the run; empty when there is no such folder."""
    if not (run_dir / folder).is_dir():
        return {}
    names = sorted(path.name for path in (run_dir / folder).iterdir() if not path.name.startswith("."))
    return {name: quote(f"{folder}/{name}") for name in names}


def _made(row: dict[str, Any]) -> str:
    """How a face was made, in one line; what is not known is left out."""
    facts = []
    if row["noise_step"] is not None:
        facts.append(f"noised to step {row['noise_step']}")
    if row["album_kind"] == "personal":
        who = row["person"] or "somebody since forgotten"
        facts.append(f"personal album of {who}: {count(row['album_size'], 'photo')}")
    elif row["album_size"] is not None:
        facts.append(f"album of {count(row['album_size'], 'picture')}")
    if row["constrain_iterations"] is not None:
        facts.append(f"{count(row['constrain_iterations'], 'step')} of fine-tuning")
    seconds = [row[f"seconds_{stage}"] for stage in STAGES if row[f"seconds_{stage}"] is not None]
    if seconds:
        facts.append(duration(sum(seconds)) + (f" on {row['device']}" if row["device"] else ""))
    if row["peak_memory_bytes"] is not None:
        facts.append(f"{row['peak_memory_bytes'] / 1e9:.1f} GB of memory")
    return ", ".join(facts)


def count(number: int, thing: str) -> str:
    """1 face, 2 faces, 40,000 faces."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def duration(seconds: float) -> str:
    """0.4 s, 41 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02} min"
    return f"{minutes} min {left:02} s" if minutes else f"{left} s"
