"""Merge the manifest's parts and write the report."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from rgcp_core.manifest import compact
from rgcp_core.report import write_report


@task(cache_policy=NO_CACHE)
def report(out: Path) -> Path:
    """Write ``manifest.parquet`` and ``report.html`` of a run's folder; return the report's path."""
    compact(out)
    return write_report(out)
