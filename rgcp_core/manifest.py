"""The manifest: what happened to every face and every photo of a run, one Parquet row each.

`ManifestRow` is the one place where its columns are defined; the Arrow schema, the check on write and the
table in `docs/manifest.md` come from it. A run writes a small part per finished chunk and merges them later:

    DIR/.rgcp/parts/<key>.parquet    the record itself; each appears whole, by atomic rename
    DIR/manifest.parquet             all parts merged by `compact`, rebuilt from them whenever wanted
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import isnan
from numbers import Integral, Real
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rgcp_core.errors import UserError

SCHEMA_VERSION = 2  # one more whenever a column is added; a column never changes its name, type or meaning
MANIFEST = "manifest.parquet"
PARTS = ".rgcp/parts"
ROWS_AT_ONCE = 5_000  # rows held in memory while merging

Text = str | None
Whole = int | None
Number = float | None
Numbers = Sequence[float] | None


@dataclass(frozen=True, kw_only=True)
class ManifestRow:
    """One face, or one photo in which there is none. None means: not known, or does not apply."""

    run_id: Annotated[str, "The execution that wrote this row."]
    photo: Annotated[str, "Path of the photo relative to the input folder, with forward slashes."]
    photo_sha256: Annotated[Text, "SHA-256 of the photo's file; null only when it could not be read."] = None
    unit: Annotated[Text, "Name of the face and of its folder `faces/<unit>`; null for a whole photo."] = None
    face_index: Annotated[Whole, "Number of the face in its photo, from 0; null for a whole photo."] = None

    status: Annotated[str, "`restored`, `no_face`, `skipped:<reason>` or `failed:<reason>`."]
    reason: Annotated[Text, "The reason as a sentence; always there when skipped or failed."] = None
    output: Annotated[Text, "Path of the restored photo relative to the run's folder; null if none."] = None

    box: Annotated[
        Numbers,
        "Face box: left, top, right, bottom, in pixels of the upright photo (EXIF orientation applied).",
    ] = None
    landmarks: Annotated[
        Numbers,
        "Five points x, y, x, y, ... in the same pixels: the eyes, the tip of the nose, the corners of the "
        "mouth; of each pair first the one on the left of the picture.",
    ] = None
    detector: Annotated[Text, "The network that found the face; null for crops that came aligned."] = None
    detector_score: Annotated[Number, "The detector's confidence, 0 to 1."] = None

    prior: Annotated[Text, "Name of the diffusion prior."] = None
    prior_sha256: Annotated[Text, "SHA-256 of the prior's weights."] = None
    preset: Annotated[Text, "Name of the preset that the settings started from."] = None
    settings_sha256: Annotated[Text, "SHA-256 of all settings; `run.json` holds them in full."] = None
    seed: Annotated[Whole, "Seed of the run; each face draws its own random numbers from it."] = None
    noise_step: Annotated[Whole, "K: the face was noised to this step before it was restored."] = None
    guidance_interval: Annotated[Whole, "The album was guided every n-th step; 0 is never."] = None
    guidance_scale: Annotated[Number, "Weight of that guidance."] = None
    album_size: Annotated[Whole, "Number of anchor images that the prior was constrained with."] = None
    constrain_iterations: Annotated[Whole, "Fine-tuning steps that were taken on the album."] = None
    loss_start: Annotated[Number, "Fine-tuning loss at its start."] = None
    loss_end: Annotated[Number, "Fine-tuning loss at its end."] = None

    seconds_align: Annotated[
        Number, "Seconds to find and align the face; its share where several were done together."
    ] = None
    seconds_album: Annotated[Number, "Seconds for the album, likewise."] = None
    seconds_constrain: Annotated[Number, "Seconds for the fine-tuning, likewise."] = None
    seconds_restore: Annotated[Number, "Seconds for the restoration, likewise."] = None
    seconds_paste: Annotated[Number, "Seconds to paste it back and save the photo, likewise."] = None
    device: Annotated[Text, "What it ran on: `cpu`, or the name of the accelerator."] = None
    peak_memory_bytes: Annotated[Whole, "Largest memory in use on that device during the chunk."] = None

    psnr: Annotated[
        Number, "PSNR of the restored against the undamaged face, in dB: nearness by pixel; higher is nearer."
    ] = None
    ssim: Annotated[Number, "SSIM against the undamaged face: nearness of local structure; 1 is identical."] = None
    lpips_alex: Annotated[
        Number, "LPIPS (AlexNet) against the undamaged face: how different it looks; 0 is identical."
    ] = None
    identity_dlib: Annotated[
        Number,
        "Cosine similarity of the restored and the true face (undamaged, or other photos of the person) "
        "to dlib's network; 1 is the same.",
    ] = None
    identity_arcface: Annotated[
        Number, "The same similarity of the restored and the true face, to ArcFace; 1 is the same."
    ] = None
    identity_input_dlib: Annotated[
        Number,
        "Cosine similarity of the restored face and the damaged input to dlib's network: is it still the "
        "same person? 1 is the same.",
    ] = None
    identity_input_arcface: Annotated[
        Number, "The same similarity of the restored face and the damaged input, to ArcFace; 1 is the same."
    ] = None
    niqe: Annotated[Number, "NIQE of the restored face, needs no reference; lower looks better."] = None
    musiq_koniq: Annotated[
        Number, "MUSIQ (KonIQ) of the restored face, 0 to 100, needs no reference; higher looks better."
    ] = None
    album_spread: Annotated[
        Number,
        "How much the album's pictures differ: their standard deviation, averaged over pixels; the higher, "
        "the more of the result is invented.",
    ] = None
    identity_gate_dlib: Annotated[
        Number,
        "Cosine similarity to dlib's network of the damaged input and the restored face blurred to the input's "
        "sharpness: what decides whether the result is kept.",
    ] = None
    identity_album_dlib: Annotated[
        Number,
        "Mean cosine similarity of the restored face and the album that it was restored with, to dlib's network.",
    ] = None
    metrics_unavailable: Annotated[Text, "Which metrics are null, and why."] = None

    person: Annotated[Text, "Known person whose personal prior restored the face; null: none."] = None
    person_similarity: Annotated[
        Number, "Mean cosine similarity of the input and the album of the nearest known person, named or not."
    ] = None
    album_kind: Annotated[
        Text, "`generative`: the album was drawn from the face; `personal`: photos of the person; null: no album."
    ] = None
    candidate: Annotated[
        Whole, "Which of several restorations was kept, from 0; the setting `gate.candidates` is their number."
    ] = None
    review: Annotated[Text, "Why somebody should look at this face; null: there is no need."] = None

    code_version: Annotated[str, "Version of rgcp, with the git revision where known."]
    started_at: Annotated[datetime, "When work on this row began, UTC."]
    finished_at: Annotated[datetime, "When it ended, UTC. Of two rows for one face, the later one counts."]


METRICS = (
    "psnr",
    "ssim",
    "lpips_alex",
    "identity_dlib",
    "identity_arcface",
    "identity_input_dlib",
    "identity_input_arcface",
    "niqe",
    "musiq_koniq",
    "album_spread",
    "identity_gate_dlib",
    "identity_album_dlib",
)

_STATUS = re.compile(r"restored|no_face|(skipped|failed):[a-z][a-z0-9_]*")
_LENGTHS = {"box": 4, "landmarks": 10}
_ARROW_TYPES: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    Sequence[float]: pa.list_(pa.float64()),
    datetime: pa.timestamp("us", tz="UTC"),
}


def _arrow_schema() -> pa.Schema:
    columns = []
    for name, annotated in get_type_hints(ManifestRow, include_extras=True).items():
        python_type, description = get_args(annotated)
        alternatives = get_args(python_type)
        nullable = NoneType in alternatives
        arrow_type = _ARROW_TYPES[alternatives[0] if nullable else python_type]
        columns.append(pa.field(name, arrow_type, nullable, {"description": description}))
    return pa.schema(columns, {"schema_version": str(SCHEMA_VERSION)})


SCHEMA = _arrow_schema()
"""The Arrow schema. A field's metadata holds its `description`, the schema's its `schema_version`."""
_BARE_SCHEMA = pa.schema([field.with_nullable(True).remove_metadata() for field in SCHEMA], SCHEMA.metadata)


# Writing


def write_part(run_dir: Path, key: str, rows: Iterable[ManifestRow]) -> Path:
    """Check the rows of one finished chunk and write them as the part `key`, in place of an earlier one.

    Text in a file name that is not valid UTF-8 is kept as `\\xNN`.
    Raises `UserError` naming row and column where a row cannot be right; nothing is written then.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", key):
        raise UserError(f"The key of a part is a file name: expected letters, digits, . _ -, got {key!r}.")
    records = [_checked(number, row) for number, row in enumerate(rows)]
    path = Path(run_dir) / PARTS / f"{key}.parquet"
    table = pa.Table.from_pylist(records, _BARE_SCHEMA)  # a part is small, the descriptions would double it
    with replacing(path, Path(run_dir)) as unfinished:
        pq.write_table(table, unfinished, compression="zstd", use_dictionary=False, write_statistics=False)
    return path


def _checked(number: int, row: ManifestRow) -> dict[str, Any]:
    """The row as Arrow wants it, or a `UserError` that names row and column."""
    record = {}
    for column in SCHEMA:
        try:
            record[column.name] = _plain(getattr(row, column.name), column)
        except (TypeError, ValueError) as error:
            raise UserError(f"Manifest row {number} ({row.photo!r}), {column.name}: {error}.") from None

    def require(true: bool, column: str, expected: str) -> None:
        if not true:
            got = f"expected {expected}, got {record[column]!r}"
            raise UserError(f"Manifest row {number} ({row.photo!r}), {column}: {got}.")

    for name in ("photo", "output"):
        path = PurePosixPath(record[name] or "")
        relative = record[name] != "" and not path.is_absolute() and ".." not in path.parts
        require(relative, name, "a relative path without '..'")
    known = "restored, no_face, skipped:<reason> or failed:<reason> (a snake_case word)"
    require(_STATUS.fullmatch(row.status) is not None, "status", known)
    if ":" in row.status:
        require(bool(row.reason), "reason", f"a sentence, as the status is {row.status}")
    if row.status == "restored":
        require(row.face_index is not None, "face_index", "a number, as the status is restored")
        require(row.output is not None, "output", "the restored photo, as the status is restored")
    if row.status == "no_face":
        require(row.face_index is None, "face_index", "none, as the status is no_face")
    if row.face_index is None:
        require(row.unit is None, "unit", "none in a row without face_index")
    else:
        require(row.face_index >= 0, "face_index", "0 or more")
        require(bool(row.unit), "unit", "the name of the face, as there is a face_index")
        require(bool(row.photo_sha256), "photo_sha256", "the photo's sum, as there is a face_index")
    return record


def _plain(value: Any, column: pa.Field) -> Any:
    """The value as plain Python, checked against the column. NumPy is welcome (landmarks (5,2)), NaN is not."""
    if value is None:
        if not column.nullable:
            raise TypeError("expected a value, got none")
        return None
    if column.type == pa.string():
        if not isinstance(value, str):
            raise TypeError(f"expected text, got {value!r} ({type(value).__name__})")
        return os.fsencode(value).decode("utf-8", "backslashreplace")
    if column.type == pa.int64():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"expected a whole number, got {value!r} ({type(value).__name__})")
        if int(value).bit_length() > 63:
            raise ValueError(f"expected a whole number of at most 63 bits, got {value}")
        return int(value)
    if column.type == pa.float64():
        return _number(value)
    if pa.types.is_timestamp(column.type):
        if not isinstance(value, datetime) or value.utcoffset() != timedelta(0):
            raise TypeError(f"expected a datetime in UTC, as from datetime.now(UTC), got {value!r}")
        return value
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
        raise TypeError(f"expected a list of numbers, got {value!r} ({type(value).__name__})")
    numbers = [_number(number) for number in (value.ravel() if isinstance(value, np.ndarray) else value)]
    if len(numbers) != _LENGTHS[column.name]:
        raise ValueError(f"expected {_LENGTHS[column.name]} numbers, got {len(numbers)}")
    return numbers


def _number(value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"expected a number, got {value!r} ({type(value).__name__})")
    if isnan(value):
        raise ValueError("expected a number, or None where it could not be computed, got NaN")
    return float(value)


@contextmanager
def replacing(path: Path, run_dir: Path) -> Iterator[Path]:
    """Give a name below `run_dir` to write to; that file takes the place of `path` when the block ends well.

    So nobody ever sees half a file. The name lies in `.rgcp/`, where what a killed process leaves harms nobody.
    """
    unfinished = run_dir / ".rgcp" / f"{path.name}.{os.getpid()}.tmp"
    try:
        for folder in (path.parent, unfinished.parent):
            folder.mkdir(parents=True, exist_ok=True)
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


# Merging


def compact(run_dir: Path) -> Path:
    """Merge all parts of a run into `DIR/manifest.parquet`, sorted by photo and face, and return its path.

    - Of several rows for one (photo, face_index), the one with the latest `finished_at` counts.
    - The latest row of a photo also decides which file is meant and whether it has faces: rows of an earlier
      content (another photo_sha256) go, and a photo's own row (no_face, failed) and rows of its faces exclude
      each other.
    - The same rows give the same bytes, however they are spread over parts.

    The parts stay. Memory holds some 5,000 whole rows and the keys of all, the rest waits in a temporary file
    (100,000 rows in 6,250 parts take 30 s, and 100 MB more than 1,000 rows). Raises `UserError` for a part
    that cannot be read.
    """
    run_dir = Path(run_dir)
    parts = sorted((run_dir / PARTS).glob("*.parquet"))
    with replacing(run_dir / MANIFEST, run_dir) as target, TemporaryFile(dir=target.parent) as spill:
        keys = [_BARE_SCHEMA.empty_table().select(_KEYS)]
        with pa.ipc.new_file(spill, _BARE_SCHEMA) as unsorted:
            for batch in _in_batches(parts):
                unsorted.write_batch(batch)
                keys.append(pa.table(batch.select(_KEYS)))
        starts = np.cumsum([len(table) for table in keys])[:-1]
        winners = _winners(pa.concat_tables(keys))
        with pa.ipc.open_file(spill) as batches, pq.ParquetWriter(target, SCHEMA, compression="zstd") as rows:
            for start in range(0, len(winners), ROWS_AT_ONCE):
                rows.write_table(_gather(batches, starts, winners[start : start + ROWS_AT_ONCE]))
    return run_dir / MANIFEST


_KEYS = ["photo", "photo_sha256", "face_index", "finished_at"]


def _in_batches(parts: list[Path]) -> Iterator[pa.RecordBatch]:
    """The rows of all parts, about 5,000 at a time."""
    waiting: list[pa.Table] = []
    for number, part in enumerate(parts, start=1):
        waiting.append(_read(part))
        if number == len(parts) or sum(map(len, waiting)) >= ROWS_AT_ONCE:
            yield from pa.concat_tables(waiting).combine_chunks().to_batches()
            waiting.clear()


def _winners(keys: pa.Table) -> np.ndarray:
    """Numbers of the rows that count, in the manifest's order. `keys` are the key columns of all rows."""
    frame = keys.to_pandas(types_mapper=_TYPES_MAPPER)
    frame["photo_sha256"] = frame["photo_sha256"].fillna("")
    frame["whole"] = frame["face_index"].isna()

    frame = frame.sort_values("finished_at", kind="stable")
    latest = frame.drop_duplicates("photo", keep="last").set_index("photo").loc[frame["photo"]]
    same_content = frame["photo_sha256"].to_numpy() == latest["photo_sha256"].to_numpy()
    same_kind = frame["whole"].to_numpy() == latest["whole"].to_numpy()
    frame = frame[same_content & same_kind].drop_duplicates(["photo", "face_index"], keep="last")
    return frame.sort_values(["photo", "face_index"]).index.to_numpy()


def _gather(batches: pa.ipc.RecordBatchFileReader, starts: np.ndarray, numbers: np.ndarray) -> pa.Table:
    """The rows of these numbers, in this order; `starts` are the numbers of each batch's first row."""
    order = np.argsort(numbers)
    of_batch = np.searchsorted(starts, numbers[order], side="right") - 1
    pieces = []
    for batch in np.unique(of_batch):
        rows = numbers[order][of_batch == batch] - starts[batch]
        pieces.append(pa.table(batches.get_batch(batch).take(pa.array(rows))))
    return pa.concat_tables(pieces).take(pa.array(np.argsort(order))).cast(SCHEMA)


# Reading


def read_manifest(paths: Path | Sequence[Path]) -> pd.DataFrame:
    """Read one manifest, or several one below the other, as a data frame with this version's columns.

    A path is a manifest file or the folder of a run. A column that an older version lacks is null; whole
    numbers are pandas' nullable `Int64`. Raises `UserError` for a file that is absent, no manifest, or newer.
    """
    return read_table(paths).to_pandas(types_mapper=_TYPES_MAPPER)


def read_table(paths: Path | Sequence[Path], columns: Sequence[str] | None = None) -> pa.Table:
    """As `read_manifest`, as an Arrow table; `columns` limits what is read."""
    tables = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        tables.append(_read(Path(path) / MANIFEST if Path(path).is_dir() else Path(path), columns))
    return pa.concat_tables(tables)


def _read(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """One file of any version up to this one, with all columns of this version or those asked for."""
    if not path.is_file():
        raise UserError(f"There is no manifest {path}. Expected a run's --out or its manifest.parquet.")
    wanted = [field for field in _BARE_SCHEMA if columns is None or field.name in columns]
    try:
        with pq.ParquetFile(path) as file:
            version = (file.metadata.metadata or {}).get(b"schema_version", b"").decode()
            if not version.isdecimal():
                raise UserError(f"{path} is Parquet but no manifest of rgcp: it has no schema_version.")
            if int(version) > SCHEMA_VERSION:
                known = f"this rgcp knows up to {SCHEMA_VERSION}; install a newer one"
                raise UserError(f"The manifest {path} has schema version {version}, {known}.")
            names = set(file.schema_arrow.names)
            there = [field.name for field in wanted if field.name in names]
            table = file.read(columns=there, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        advice = "A damaged part can be deleted: the same command then does its chunk again"
        raise UserError(f"The manifest {path} cannot be read ({error}). {advice}.") from error
    arrays = [
        table.column(field.name).cast(field.type) if field.name in there else pa.nulls(len(table), field.type)
        for field in wanted
    ]
    return pa.table(arrays, pa.schema(wanted))


_TYPES_MAPPER = {pa.int64(): pd.Int64Dtype()}.get


# The page about it


def schema_markdown() -> str:
    """The columns as a Markdown table, for `docs/manifest.md`."""
    names = {pa.string(): "text", pa.int64(): "int64", pa.float64(): "float64"}
    names |= {pa.list_(pa.float64()): "list of float64", pa.timestamp("us", tz="UTC"): "timestamp (µs, UTC)"}
    lines = ["| column | type | may be null | meaning |", "|---|---|---|---|"]
    for column in SCHEMA:
        null, description = "yes" if column.nullable else "no", column.metadata[b"description"].decode()
        lines.append(f"| `{column.name}` | {names[column.type]} | {null} | {description} |")
    return f"Schema version {SCHEMA_VERSION}.\n\n" + "\n".join(lines) + "\n"


def with_schema(page: str) -> str:
    """The text of `docs/manifest.md` with the table between its two marks made anew."""
    before, begin, rest = page.partition(" python -m rgcp_core.manifest docs/manifest.md -->\n")
    _, end, after = rest.partition("<!-- end of columns -->")
    return before + begin + schema_markdown() + end + after


if __name__ == "__main__":
    documentation = Path(sys.argv[1])
    documentation.write_text(with_schema(documentation.read_text(encoding="utf-8")), encoding="utf-8")
