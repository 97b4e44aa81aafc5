"""Merge the manifest's parts and write the report."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from rgcp_core.manifest import compact
from rgcp_core.report import write_report
from rgcp_core.review import write_review


@task(cache_policy=NO_CACHE)
def report(out: Path) -> Path:
    """Write ``manifest.parquet``, ``review.parquet`` and ``report.html`` of a run; return the report's path."""
    compact(out)
    write_review(out)
    return write_report(out)
