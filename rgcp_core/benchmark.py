"""Measuring restored faces of several methods in one way, and putting the numbers together.

All pictures of a benchmark show the same faces under the same names: the damaged inputs, each method's results and,
where there are any, the clean pictures. Every one is cut and reduced by the same code to the same window and size, and
rounded to 8 bits, before it is measured, so that methods with outputs of 512 px are compared at the prior's size.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from rgcp_core.errors import UnitError, UserError
from rgcp_core.faces.align import FFHQ_WINDOW, Alignment, crop_face
from rgcp_core.images import from_uint8, load_photo, to_uint8
from rgcp_core.metrics import METRICS, measure_faces
from rgcp_core.metrics.distribution import FeatureExtractor, FeatureSet, compare, extract_features
from rgcp_core.metrics.identity import Window, load_identity
from rgcp_core.statistics import mean_interval

Framing = Literal["window", "ffhq"]
"""What the pictures show: the prior's own crop window, or the whole FFHQ square, out of which that window is cut."""

Progress = Callable[[int, int], None]

INPUT, RESTORED = "input", "rgcp"
"""Names of the rows for the damaged pictures and for our own results."""

Item = TypeVar("Item")

LOWER_IS_BETTER = ("lpips_alex", "niqe", "fid", "kid", "refused")
BATCH = 16

FACES_SCHEMA = pa.schema(
    [
        pa.field(
            "method",
            pa.string(),
            False,
            {"description": "`input`, `rgcp`, or the NAME of --method NAME=DIR."},
        ),
        pa.field("face", pa.string(), False, {"description": "Name of the picture in the test set."}),
        pa.field("status", pa.string(), False, {"description": "`measured`, `missing` or `failed:<reason>`."}),
        pa.field("reason", pa.string(), True, {"description": "Why it was not measured, as a sentence."}),
        pa.field("picture_sha256", pa.string(), True, {"description": "SHA-256 of the file that was measured."}),
        *(pa.field(name, pa.float64(), True) for name in METRICS),
        pa.field(
            "identity_rank",
            pa.int64(),
            True,
            {"description": "1: of all clean faces of the set its own is the most similar; 2: one other is more."},
        ),
        pa.field("metrics_unavailable", pa.string(), True, {"description": "The metrics that are null and why."}),
    ],
    {"schema_version": "1"},
)
"""Columns of `faces.parquet`: one row a method and face."""


class Crops(NamedTuple):
    """How pictures are brought to one window and size."""

    size: int
    crop_window: Window
    framing: Framing

    def load(self, path: Path) -> Tensor:
        """Read an aligned square as (3,size,size) in [-1,1], with the values an 8-bit file of that size would have.

        `UnitError` for a file that is not readable or not square.
        """
        photo = load_photo(path)
        width, height = photo.size
        if width != height:
            raise UnitError("not_square", f"{path}: an aligned face is square, this is {width} x {height} px.")
        x0, y0, x1, y1 = self.crop_window if self.framing == "ffhq" else FFHQ_WINDOW
        scale = width / self.size
        matrix = np.array([[scale * (x1 - x0), 0, x0 * width], [0, scale * (y1 - y0), y0 * height]])
        return from_uint8(to_uint8(crop_face(photo.rgb, Alignment(matrix, self.size))))


@dataclass(frozen=True)
class References:
    """What results are compared with."""

    inputs: Mapping[str, Path]
    """Damaged picture by face."""
    clean: Mapping[str, Path | None]
    """Undamaged picture by face; empty when there are none."""
    album: Sequence[Path] = ()
    """Other pictures of the one person whom all faces show: identity is then the mean similarity to them."""


def measure_method(
    method: str,
    pictures: Mapping[str, Path | None],
    references: References,
    crops: Crops,
    *,
    reference_crops: Crops | None = None,
    device: torch.device | str = "cpu",
    on_step: Progress | None = None,
) -> pa.Table:
    """Measure one method's picture of every face.

    Args:
        method: name of the rows.
        pictures: the method's picture by face; None where it has none. The faces are those of `references.inputs`.
        references: what to compare with.
        crops: how the method's pictures are framed, and the size to measure at.
        reference_crops: the same of the references, when they are framed otherwise.
        device: for the networks.
        on_step: progress callback, (faces done, faces in all).

    Returns:
        A table of `FACES_SCHEMA`: a row for every face, also for one that could not be measured.
    """
    reference_crops = reference_crops or crops
    which = [name for name in METRICS if method != INPUT or not name.startswith("identity_input_")]
    album = torch.stack([reference_crops.load(path) for path in references.album]) if references.album else None
    rows: dict[str, dict[str, Any]] = {}
    for names in _batched(list(references.inputs)):
        loaded: list[str] = []
        stacks: dict[str, list[Tensor]] = {"restored": [], "input": [], "clean": []}
        for name in names:
            rows[name] = {"method": method, "face": name, "status": "measured"}
            path, clean = pictures.get(name), references.clean.get(name)
            if path is None:
                rows[name] |= {"status": "missing", "reason": "The method has no picture of this face."}
                continue
            if references.clean and clean is None:
                rows[name] |= {"status": "missing", "reason": "There is no clean picture of this face."}
                continue
            try:
                faces = {"restored": crops.load(path), "input": reference_crops.load(references.inputs[name])}
                if clean is not None:
                    faces["clean"] = reference_crops.load(clean)
            except UnitError as error:
                rows[name] |= {"status": f"failed:{error.reason}", "reason": str(error)}
                continue
            for kind, face in faces.items():
                stacks[kind].append(face)
            rows[name]["picture_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            loaded.append(name)
        if loaded:
            values, unavailable = measure_faces(
                torch.stack(stacks["restored"]),
                input=torch.stack(stacks["input"]),
                clean=torch.stack(stacks["clean"]) if stacks["clean"] else None,
                album=album,
                which=which,
                crop_window=crops.crop_window,
                device=device,
            )
            why = "\n".join(f"{name}: {reason}" for name, reason in unavailable.items()) or None
            for i, name in enumerate(loaded):
                rows[name] |= {metric: column[i] for metric, column in values.items()} | {"metrics_unavailable": why}
        if on_step is not None:
            on_step(len(rows), len(references.inputs))
    measured = {name: path for name, path in pictures.items() if path and rows[name]["status"] == "measured"}
    for name, rank in identity_ranks(measured, references.clean, crops, reference_crops, device).items():
        rows[name]["identity_rank"] = rank
    return pa.Table.from_pylist(list(rows.values()), FACES_SCHEMA)


def identity_ranks(
    pictures: Mapping[str, Path],
    clean: Mapping[str, Path | None],
    crops: Crops,
    reference_crops: Crops,
    device: torch.device | str = "cpu",
) -> dict[str, int]:
    """Is each face more like its own clean picture than like any other? 1 is yes, n that n - 1 others are nearer.

    Unlike a threshold of the similarity this does not depend on the size and damage of the pictures. Empty with fewer
    than two clean faces, or when no recognition network is here. Two clean pictures of one person count as two.
    """
    try:
        load_identity("auto", device)
    except UserError:
        return {}
    known = tuple((name, path) for name, path in clean.items() if path is not None)
    names, of_clean = _clean_embeddings(known, reference_crops, str(device))
    pictures = {name: path for name, path in pictures.items() if name in names}
    if len(names) < 2 or not pictures:
        return {}
    _, embedded = _embeddings(list(pictures.items()), crops, device)
    ranks = {}
    for row, name in zip(embedded @ of_clean.T, pictures, strict=True):
        ranks[name] = 1 + int((row > row[names.index(name)] + 1e-6).sum())
    return ranks


@lru_cache(maxsize=1)  # every method is held against the same clean faces
def _clean_embeddings(pictures: tuple[tuple[str, Path], ...], crops: Crops, device: str) -> tuple[list[str], Tensor]:
    return _embeddings(pictures, crops, device)


def _embeddings(
    pictures: Sequence[tuple[str, Path]], crops: Crops, device: torch.device | str
) -> tuple[list[str], Tensor]:
    """Names of the faces that can be read, and their embeddings (N,D)."""
    network = load_identity("auto", device)
    names: list[str] = []
    embedded = [torch.empty(0)]
    for batch in _batched(pictures):
        loaded = []
        for name, path in batch:
            try:
                loaded.append(crops.load(path))
                names.append(name)
            except UnitError:
                continue
        if loaded:
            embedded.append(network.embed(torch.stack(loaded), crops.crop_window))
    return names, torch.cat(embedded[1:] or embedded)


# ---------------------------------------------------------------------------------------------------- whole sets


def load_features(paths: Sequence[Path], crops: Crops, extractor: FeatureExtractor) -> FeatureSet:
    """Features of a set of pictures for FID and KID, each cut and reduced as for the other metrics."""
    return extract_features(_batches(paths, crops), extractor)


def _batches(paths: Sequence[Path], crops: Crops) -> Iterator[Tensor]:
    for batch in _batched(paths):
        yield torch.stack([crops.load(path) for path in batch])


def distances(images: FeatureSet, reference: FeatureSet) -> dict[str, dict[str, Any]]:
    """FID and KID with all they depend on, by name, ready for JSON."""
    return {
        distance.metric: {
            "mean": distance.value,
            "spread": distance.spread,
            "extractor": distance.extractor,
            "resize_mode": distance.resize_mode,
            "n": distance.count,
            "reference_count": distance.reference_count,
            "reference_sha256": distance.reference_sha256,
        }
        for distance in compare(images, reference)
    }


# -------------------------------------------------------------------------------------------------------- summary


def summarise(faces: pa.Table, seed: int = 0) -> dict[str, Any]:
    """Put the rows of all methods together.

    Args:
        faces: rows of `FACES_SCHEMA`.
        seed: of the bootstrap.

    Returns:
        Ready for JSON:
        `methods`: by method `faces`, `measured`, `identity_check` and `metrics`: by metric mean, low, high (the 95 %
        BCa bootstrap interval over faces), n. A mean of which a value is infinite (PSNR of equal pictures) is null, and
        `infinite` says of how many faces.
        `differences`: `rgcp` minus each other method over the faces that both have, likewise.
        `unavailable`: by metric, why it is null everywhere.
    """
    frame = faces.to_pandas()
    by_method = {str(method): rows for method, rows in frame.groupby("method", sort=False)}
    methods = {}
    for method, rows in by_method.items():
        measured = rows[rows["status"] == "measured"]
        methods[method] = {
            "faces": len(rows),
            "measured": len(measured),
            "identity_check": identity_check(measured["identity_rank"].dropna().tolist()),
            "metrics": {
                metric: _estimate(measured[metric], seed) for metric in METRICS if measured[metric].notna().any()
            },
        }
    return {
        "methods": methods,
        "differences": _differences(by_method, seed),
        "unavailable": _unavailable(frame),
    }


def identity_check(ranks: Sequence[float]) -> dict[str, Any]:
    """Are these the people that they should be? Passed when more than half of the faces are nearest to their own.

    Needs two faces at least; by chance one face of any set would be. `result` is passed, failed, or null.
    """
    nearest = sum(rank == 1 for rank in ranks)
    if len(ranks) < 2:
        return {"result": None, "nearest_to_own": nearest, "n": len(ranks)}
    passed = nearest > max(1, len(ranks) / 2)
    return {"result": "passed" if passed else "failed", "nearest_to_own": nearest, "n": len(ranks)}


def _estimate(values: pd.Series, seed: int) -> dict[str, Any]:
    array = values.dropna().to_numpy(float)
    infinite = int(np.isinf(array).sum())
    if infinite:
        return {"mean": None, "low": None, "high": None, "n": len(array), "infinite": infinite}
    estimate = mean_interval(array, seed=seed)
    low, high = (None if math.isnan(bound) else bound for bound in (estimate.low, estimate.high))
    return {"mean": estimate.mean, "low": low, "high": high, "n": estimate.n, "infinite": 0}


def _differences(by_method: Mapping[str, pd.DataFrame], seed: int) -> dict[str, dict[str, Any]]:
    """Paired, face by face: that takes out how hard each face is."""
    if RESTORED not in by_method:
        return {}
    ours = by_method[RESTORED].set_index("face")
    differences: dict[str, dict[str, Any]] = {}
    for method in by_method:
        if method == RESTORED:
            continue
        theirs = by_method[method].set_index("face")
        pairs = {metric: ours[metric] - theirs[metric] for metric in METRICS}
        differences[method] = {metric: _estimate(pair, seed) for metric, pair in pairs.items() if pair.notna().any()}
    return differences


def _unavailable(frame: pd.DataFrame) -> dict[str, str]:
    """Reason by metric, for those that no row has."""
    reasons: dict[str, str] = {}
    for text in frame["metrics_unavailable"].dropna().unique():
        for line in text.splitlines():
            metric, _, reason = line.partition(": ")
            if frame[metric].isna().all():
                reasons.setdefault(metric, reason)
    return reasons


def _batched(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]
