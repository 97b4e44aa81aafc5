"""Remove a person from where the project keeps people: the folder of people, proposals and the records of runs."""

import json
import re
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import UserError
from .images import write_atomically
from .manifest import MANIFEST, PARTS
from .people import CARD, check_name
from .proposal import forget_in_proposal
from .review import REVIEW

FORGOTTEN = "(forgotten)"
"""Stands where the name stood in a run's records."""


def check_known(people: Path, name: str, proposals: list[Path], runs: list[Path]) -> None:
    """Refuse what could not be done whole: a name that nobody has, folders that are no proposal or no run.

    Raises:
        UserError: says which.
    """
    if not (people / check_name(name)).is_dir() and not proposals and not runs:
        known = ", ".join(sorted(path.parent.name for path in people.glob(f"*/{CARD}"))) or "nobody"
        raise UserError(f"Nobody called {name!r} is known in {people}; known: {known}.")
    for out in proposals:
        if not (out / "people.parquet").is_file():
            raise UserError(f"{out} is no folder of 'rgcp people DIR --out': it has no people.parquet.")
    for run in runs:
        if not (run / MANIFEST).is_file():
            raise UserError(f"{run} is no folder of a run: it has no {MANIFEST}.")


def forget_person(people: Path, name: str, proposals: list[Path], runs: list[Path]) -> list[str]:
    """Remove a person; return what was removed, a sentence each.

    In runs the name and the similarities to that person are blanked; the restored photos stay.

    Raises:
        UserError: the person was found nowhere, or as `check_known`.
    """
    check_known(people, name, proposals, runs)
    removed = []
    folder = people / name
    if folder.is_dir():
        files = [path.name for path in sorted(folder.iterdir())]
        shutil.rmtree(folder)
        removed.append(f"{folder}: {', '.join(files)}")
    for out in proposals:
        count = forget_in_proposal(out, name)
        if count:
            removed.append(f"{out}: {count} faces with their rows, embeddings and pictures")
    for run in runs:
        count = forget_in_run(run, name)
        if count:
            removed.append(f"{run}: the name in {count} rows and in the run's records; the restored photos stay")
    if not removed:
        places = ", ".join(str(place) for place in [people, *proposals, *runs])
        raise UserError(f"Nobody called {name!r} was found in {places}; nothing was removed.")
    return removed


def forget_in_run(run: Path, name: str) -> int:
    """Blank a person in the manifest, its parts and the records of a run; return the rows of the manifest changed.

    A copy of the personal prior that was kept beside a face (``--keep all``) is removed.
    """
    count = 0
    of_run = json.loads((run / "run.json").read_text(encoding="utf-8")) if (run / "run.json").is_file() else {}
    only_one = of_run.get("person") == name  # then all similarities are to that person
    for path in [run / MANIFEST, run / REVIEW, *sorted((run / PARTS).glob("*.parquet"))]:
        if path.is_file():
            units = _blank(path, name, only_one)
            count += len(units) if path.name == MANIFEST else 0
            for unit in units:
                (run / "faces" / unit / "constrained.delta").unlink(missing_ok=True)
    for path in [run / "run.json", *sorted((run / "faces").glob("*/record.json"))]:
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            without = _without(content, name)
            if without != content:
                write_atomically(path, json.dumps(without, indent=1, ensure_ascii=False).encode())
    return count


def _blank(path: Path, name: str, only_one: bool) -> list[str]:
    """Blank a person in a table of faces; return the units that were theirs.

    With `only_one` the similarities of all others are blanked too, since they are to this person.
    """
    table = pq.ParquetFile(path).read()
    if "person" not in table.column_names:
        return []
    theirs = [value == name for value in table["person"].to_pylist()]
    units = [unit for own, unit in zip(theirs, table["unit"].to_pylist(), strict=True) if own]
    mention = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")
    before = table
    for number, field in enumerate(table.schema):
        values = table[field.name].to_pylist()
        if field.name.startswith(("person", "identity_album")):
            values = [None if own or only_one else value for own, value in zip(theirs, values, strict=True)]
        elif field.name in ("reason", "review"):  # sentences, which may also say whom a face is not like enough
            values = [value and mention.sub(FORGOTTEN, value) for value in values]
        else:
            continue
        table = table.set_column(number, field, pa.array(values, field.type))
    if table != before:
        buffer = BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        write_atomically(path, buffer.getvalue())
    return units


def _without(content: Any, name: str) -> Any:
    """JSON values with the name replaced, wherever it stands alone or after ``--person=``."""
    if isinstance(content, dict):
        return {_without(key, name): _without(value, name) for key, value in content.items()}
    if isinstance(content, list):
        return [_without(value, name) for value in content]
    if content == name:
        return FORGOTTEN
    return f"--person={FORGOTTEN}" if content == f"--person={name}" else content
