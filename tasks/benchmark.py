"""Measure the results of a benchmark and write them down."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from rgcp_core.benchmark import Crops, References, distances, load_features, measure_method
from rgcp_core.benchmark_page import write_results
from rgcp_core.datasets import PublishedRow
from rgcp_core.errors import UserError
from rgcp_core.images import find_photos
from rgcp_core.metrics.distribution import ResizeMode, inception_extractor
from tasks.device import pick_device


@task(cache_policy=NO_CACHE, task_run_name="measure {method}")
def measure(
    method: str,
    pictures: Mapping[str, Path | None],
    references: References,
    crops: Crops,
    reference_crops: Crops,
    device: str,
) -> pa.Table:
    """Measure every face of one method; see `rgcp_core.benchmark.measure_method`."""
    device_here = pick_device(device)
    return measure_method(method, pictures, references, crops, reference_crops=reference_crops, device=device_here)


@task(cache_policy=NO_CACHE)
def measure_sets(
    methods: Mapping[str, tuple[Sequence[Path], Crops]],
    reference: Path | None,
    reference_crops: Crops,
    resize_mode: ResizeMode,
    device: str,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """FID and KID of every method's pictures against a reference folder, by method; and why there are none."""
    if reference is None:
        reason = "No reference set was given (--reference DIR), and these compare two sets."
        return {}, {"fid": reason, "kid": reason}
    try:
        extractor = inception_extractor(resize_mode, pick_device(device))
    except UserError as error:
        return {}, {"fid": str(error), "kid": str(error)}
    paths = [root / name for root, name in find_photos([reference])]
    of_reference = load_features(paths, reference_crops, extractor)
    sets = {
        method: distances(load_features(pictures, crops, extractor), of_reference)
        for method, (pictures, crops) in methods.items()
        if len(pictures) > 1
    }
    return sets, {} if sets else {"fid": "No method has two pictures.", "kid": "No method has two pictures."}


@task(cache_policy=NO_CACHE)
def write_benchmark(
    folder: Path,
    faces: pa.Table,
    summary: Mapping[str, Any],
    published: Sequence[PublishedRow],
    columns: Mapping[str, tuple[Mapping[str, Path | None], Crops]],
) -> Path:
    """Write all files of a benchmark; return the table's path."""
    return write_results(folder, faces, summary, published, columns)
