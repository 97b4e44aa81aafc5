"""Remove a person from where the project keeps people: the folder of people, proposals and the records of runs."""

import json
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

    In runs the name and all columns that begin with ``person`` are blanked; the restored photos stay.

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
    """Blank a person in the manifest, its parts and the records of a run; return the rows of the manifest changed."""
    count = 0
    for path in [run / MANIFEST, run / "review.parquet", *sorted((run / PARTS).glob("*.parquet"))]:
        if path.is_file():
            changed = _blank(path, name)
            count += changed if path.name == MANIFEST else 0
    for path in [run / "run.json", *sorted((run / "faces").glob("*/record.json"))]:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            content = json.loads(text)
            without = _without(content, name)
            if without != content:
                write_atomically(path, json.dumps(without, indent=1, ensure_ascii=False).encode())
    return count


def _blank(path: Path, name: str) -> int:
    table = pq.ParquetFile(path).read()
    columns = [column for column in table.column_names if column.startswith("person")]
    if "person" not in columns:
        return 0
    theirs = [value == name for value in table["person"].to_pylist()]
    if not any(theirs):
        return 0
    for column in columns:
        field = table.schema.field(column)
        values = [None if own else value for own, value in zip(theirs, table[column].to_pylist(), strict=True)]
        table = table.set_column(table.column_names.index(column), field, pa.array(values, field.type))
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_atomically(path, buffer.getvalue())
    return sum(theirs)


def _without(content: Any, name: str) -> Any:
    """JSON values with the name replaced, wherever it stands alone or after ``--person=``."""
    if isinstance(content, dict):
        return {_without(key, name): _without(value, name) for key, value in content.items()}
    if isinstance(content, list):
        return [_without(value, name) for value in content]
    if content == name:
        return FORGOTTEN
    return f"--person={FORGOTTEN}" if content == f"--person={name}" else content
