"""The head of the report: what a run did, in words and in a table of counts."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rgcp_core.report.entries import STAGES, count, duration, kind_of


@dataclass(frozen=True)
class StatusCount:
    """How many rows have one status, the reason that the first of them gives, and a link to that one."""

    status: str
    kind: str
    number: int
    reason: str | None
    link: str


@dataclass(frozen=True)
class Summary:
    """What stands above the entries."""

    run_id: str
    headline: str
    sentences: list[str]
    command: str | None
    statuses: list[StatusCount]
    counts: dict[str, int]
    unmeasured: str | None
    settings: list[tuple[str, str]]


def summarise(rows: Sequence[dict[str, Any]], links: Sequence[str], run: dict[str, Any]) -> Summary:
    """Put a run into words. `rows` are in the report's order, `links` lead to each, `run` is run.json."""
    statuses: dict[str, StatusCount] = {}
    for row, link in zip(rows, links, strict=True):
        one = statuses.get(row["status"]) or StatusCount(row["status"], kind_of(row), 0, row["reason"], link)
        statuses[row["status"]] = StatusCount(one.status, one.kind, one.number + 1, one.reason, one.link)
    counts: dict[str, int] = {}
    for status in statuses.values():
        counts[status.kind] = counts.get(status.kind, 0) + status.number
    faces = [row for row in rows if row["face_index"] is not None]
    restored = [row for row in rows if row["status"] == "restored"]
    unmeasured = {row["metrics_unavailable"] for row in restored}
    command = run.get("command")
    return Summary(
        run_id=str(run.get("run_id") or ""),
        headline=f"{len(restored):,} of {count(len(faces), 'face')} restored",
        sentences=[
            *_what_was_done(rows, faces, run),
            *_with_what(restored, run),
            *_how_long(rows, restored, run),
        ],
        command=shlex.join(map(str, command)) if isinstance(command, list) else command,
        statuses=list(statuses.values()),
        counts=counts,
        unmeasured=unmeasured.pop() if len(unmeasured) == 1 else None,
        settings=[
            (f"{key}{name}", value)
            for key in ("inputs", "settings", "prior", "versions", "git_revision")
            for name, value in _flat(run.get(key))
        ],
    )


def _what_was_done(
    rows: Sequence[dict[str, Any]], faces: Sequence[dict[str, Any]], run: dict[str, Any]
) -> Iterator[str]:
    photos = len({row["photo"] for row in rows})
    start, end = _times(rows, run)
    when = ""
    if start and end and start.date() == end.date():
        when = f"On {_day(start)}, from {start:%H:%M} to {end:%H:%M} UTC, "
    elif start and end:
        when = f"From {_day(start)}, {start:%H:%M}, to {_day(end)}, {end:%H:%M} UTC, "
    found = f"{count(photos, 'photo')} {'was' if photos == 1 else 'were'} searched and "
    sentence = f"{when}{found}{count(len(faces), 'face')} found."
    yield sentence[0].upper() + sentence[1:]

    kinds = [kind_of(row) for row in faces]
    whole = [kind_of(row) for row in rows if row["face_index"] is None]
    parts = [f"{kinds.count('restored'):,} {_were(kinds.count('restored'))} restored"]
    if kinds.count("skipped"):
        parts.append(f"{kinds.count('skipped'):,} {_were(kinds.count('skipped'))} left alone on purpose")
    if kinds.count("failed"):
        parts.append(f"{kinds.count('failed'):,} failed")
    if faces:
        yield f"Of the faces {_list(parts)}."
    parts = []
    if whole.count("no_face"):
        parts.append(f"{count(whole.count('no_face'), 'photo')} without a face")
    if whole.count("skipped"):
        parts.append(f"{count(whole.count('skipped'), 'photo')} left out on purpose")
    if whole.count("failed"):
        parts.append(f"{count(whole.count('failed'), 'photo')} that could not be processed")
    if parts:
        yield f"There {'is' if parts[0].startswith('1 ') else 'are'} {_list(parts)}."


def _with_what(restored: Sequence[dict[str, Any]], run: dict[str, Any]) -> Iterator[str]:
    first = restored[0] if restored else {}
    card = run.get("prior")
    prior = card.get("name") if isinstance(card, dict) else first.get("prior")
    preset = run.get("preset") or first.get("preset")
    seed = run.get("seed", first.get("seed"))
    if prior:
        preset_used = f", with the preset {preset}" if preset else ""
        yield f"The prior was {prior}{preset_used}{'' if seed is None else f' and seed {seed}'}."


def _how_long(rows: Sequence[dict[str, Any]], restored: Sequence[dict[str, Any]], run: dict[str, Any]) -> Iterator[str]:
    start, end = _times(rows, run)
    if start and end:
        spent = sum(row[f"seconds_{stage}"] or 0 for row in restored for stage in STAGES)
        each = f", {duration(spent / len(restored))} of work for a restored face" if spent else ""
        yield f"It took {duration((end - start).total_seconds())} in all{each}."


def _times(rows: Sequence[dict[str, Any]], run: dict[str, Any]) -> tuple[datetime | None, datetime | None]:
    """Start and end by run.json, or else by the rows."""
    try:
        start, end = (datetime.fromisoformat(run[key]) for key in ("started_at", "finished_at"))
        return start.astimezone(UTC), end.astimezone(UTC)
    except (KeyError, TypeError, ValueError):
        starts, ends = [row["started_at"] for row in rows], [row["finished_at"] for row in rows]
        return min(starts, default=None), max(ends, default=None)


def _flat(value: Any) -> Iterator[tuple[str, str]]:
    """Nested settings as (".album.size", "16")."""
    if isinstance(value, dict):
        for key, inner in value.items():
            for name, text in _flat(inner):
                yield f".{key}{name}", text
    elif isinstance(value, list):
        yield "", ", ".join(map(str, value))
    elif value is not None:
        yield "", str(value)


def _day(moment: datetime) -> str:
    return f"{moment.day} {moment:%B %Y}"


def _were(number: int) -> str:
    return "was" if number == 1 else "were"


def _list(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
