"""Where the tasks of a flow run: threads of this process, or the processes of a Dask or Ray cluster."""

from typing import Any

from prefect import Flow

from rgcp_core.errors import UserError

RUNNERS = ("local", "dask", "ray")


def on_runner(flow: Flow[Any, Any], runner: str, workers: int = 1, cluster: str | None = None) -> Flow[Any, Any]:
    """The same flow with its tasks on ``runner``.

    Args:
        flow: any flow that submits its tasks.
        runner: ``local``: threads of this process, one chunk on the device at a time. ``dask``, ``ray``: processes, so
            that one that dies (out of memory, a lost machine) costs its chunk another attempt and not the run.
        workers: processes of a cluster that is started for the run and stopped with it.
        cluster: address of a cluster to use instead, e.g. ``tcp://10.0.0.5:8786`` or ``ray://10.0.0.5:10001``; its
            machines see the same folders under the same paths.

    Raises:
        UserError: an unknown runner, or one whose package is not installed.
    """
    if runner == "local":
        return flow
    if runner == "dask":
        return flow.with_options(task_runner=_dask(workers, cluster))
    if runner == "ray":
        return flow.with_options(task_runner=_ray(workers, cluster))
    raise UserError(f"Unknown runner {runner!r}; there are: {', '.join(RUNNERS)}.")


def _dask(workers: int, cluster: str | None) -> Any:
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        raise UserError("The runner dask is not installed: pip install 'rgcp[dask]'.") from error
    if cluster:
        return DaskTaskRunner(address=cluster)
    return DaskTaskRunner(cluster_kwargs={"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None})


def _ray(workers: int, cluster: str | None) -> Any:
    try:
        from prefect_ray import RayTaskRunner
    except ImportError as error:
        raise UserError("The runner ray is not installed: pip install 'rgcp[ray]'.") from error
    if cluster:
        return RayTaskRunner(address=cluster)
    return RayTaskRunner(init_kwargs={"num_cpus": workers, "include_dashboard": False})
