"""Register the deployments of ``prefect.yaml`` with the Prefect API, and what they need there."""

import os
import subprocess
import sys
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import get_current_settings

from flows.watchdog import watch_for_killed_runs
from rgcp_core.errors import RgcpError, UserError

WORK_POOL = "rgcp"
HOME = Path(__file__).parents[1]


def deploy(photos: Path, out: Path, benchmark: Path, at_a_time: int) -> list[str]:
    """Make the work pool, the deployments and the automation; done again, it updates them.

    Args:
        photos: folder that the nightly run restores.
        out: folder for its results; the benchmark's are beside it.
        benchmark: data set of the weekly benchmark.
        at_a_time: flow runs that the pool's workers start at the same time.

    Returns:
        Names of the deployments.

    Raises:
        UserError: this is no checkout.
        RgcpError: the API refused something.
    """
    if not (HOME / "prefect.yaml").is_file():
        raise UserError(f"There is no prefect.yaml in {HOME}: rgcp deploy works in a checkout of the project.")
    with get_client(sync_client=True) as client:
        try:
            client.create_work_pool(WorkPoolCreate(name=WORK_POOL, type="process", concurrency_limit=at_a_time))
        except ObjectAlreadyExists:
            client.update_work_pool(WORK_POOL, WorkPoolUpdate(concurrency_limit=at_a_time))
    watch_for_killed_runs()
    variables = {
        "PREFECT_API_URL": get_current_settings().api.url,
        "RGCP_HOME": HOME,
        "RGCP_PHOTOS": photos.absolute(),
        "RGCP_OUT": out.absolute(),
        "RGCP_BENCHMARK": benchmark.absolute(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=HOME,
        env=os.environ | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RgcpError(f"prefect deploy --all failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/deployments/filter", json={"deployments": {"tags": {"all_": ["rgcp"]}}})
        return sorted(each["name"] for each in found.json())
