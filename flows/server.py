"""The Prefect API that a run reports to: the configured one, one that is running here, or one of our own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, get_current_settings, temporary_settings
from rich.console import Console

from flows.progress import to_ui
from flows.watchdog import watch_for_killed_runs
from rgcp_core.errors import RgcpError, UserError

PORT = 4200
DEFAULT_URL = f"http://127.0.0.1:{PORT}/api"
START_SECONDS = 240.0  # the first start creates the database: 24 s were seen on two busy cores, minutes on starved ones


@contextmanager
def prefect_api() -> Iterator[str]:
    """Give the address of a Prefect API for the time of a run.

    The configured one (``PREFECT_API_URL``, a profile) if there is one; a server that answers at Prefect's usual
    local address; otherwise a server on the local SQLite database, started here and stopped at the end. What it
    recorded stays in the database: ``rgcp ui`` shows it.
    """
    configured = get_current_settings().api.url
    if configured:
        yield str(configured)
        return
    if healthy(DEFAULT_URL):
        with reporting_to(DEFAULT_URL):
            to_ui(watch_for_killed_runs)
            yield DEFAULT_URL
        return
    port = own_port()
    url = f"http://127.0.0.1:{port}/api"
    server = start_server(port)
    try:
        wait_until_healthy(url, server)
        with reporting_to(url):
            try:
                yield url
            finally:
                APILogHandler().flush()  # the last lines of the run's log, while there is a server to take them
    finally:
        stop_server(server)


@contextmanager
def required_api() -> Iterator[str]:
    """Give the address of a Prefect API that is there already; raise `UserError` if there is none."""
    configured = get_current_settings().api.url
    url = str(configured) if configured else DEFAULT_URL
    if not healthy(url):
        raise UserError(f"No Prefect API answers at {url}. Start one (rgcp ui), or set PREFECT_API_URL to yours.")
    with reporting_to(url):
        yield url


def serve_page(port: int, console: Console) -> None:
    """Serve the Prefect page of the local database until Ctrl-C, SIGTERM or the server's end."""
    page = f"http://127.0.0.1:{port}"
    if healthy(f"{page}/api"):
        console.print(f"A Prefect server is running there already: {page}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    server = start_server(port)
    try:
        wait_until_healthy(f"{page}/api", server)
        with reporting_to(f"{page}/api"):
            to_ui(watch_for_killed_runs)
        console.print(f"Runs: {page}   (Ctrl-C stops the server; what it recorded stays)")
        if port != PORT:
            console.print(f"Runs report to it when this is set: PREFECT_API_URL={page}/api")
        server.wait()
    except KeyboardInterrupt:
        console.print("Stopped.")
    finally:
        stop_server(server)


@contextmanager
def reporting_to(url: str) -> Iterator[None]:
    """Let this process and its children report to ``url``."""
    before = os.environ.get("PREFECT_API_URL")
    os.environ["PREFECT_API_URL"] = url
    try:
        with temporary_settings({PREFECT_API_URL: url}):
            yield
    finally:
        if before is None:
            del os.environ["PREFECT_API_URL"]
        else:
            os.environ["PREFECT_API_URL"] = before


def start_server(port: int) -> subprocess.Popen[bytes]:
    """Start a Prefect server on the loopback; it ends when this process ends, however it ends."""
    home = Path(PREFECT_HOME.value())
    home.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),  # the page calls this port; --port alone would leave it at 4200
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
        "PREFECT_LOGGING_LEVEL": "ERROR",
    }
    with (home / "rgcp-server.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", _SERVER_CODE, str(os.getpid())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C stops the run first; the server must still hear of it
        )


# The server runs in a child that watches its parent: a killed run must leave no server behind.
_SERVER_CODE = """
import os, signal, subprocess, sys, time
parent = int(sys.argv[1])
server = subprocess.Popen([sys.executable, "-m", "prefect", "server", "start"])
def stop(*_):
    raise SystemExit
signal.signal(signal.SIGTERM, stop)
try:
    while server.poll() is None and os.getppid() == parent:
        time.sleep(0.5)
finally:
    server.terminate()
    try:
        server.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(0, signal.SIGKILL)
"""


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """Stop a server that `start_server` started, with all its children."""
    server.terminate()
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_until_healthy(url: str, server: subprocess.Popen[bytes]) -> None:
    """Wait for a server to answer."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        if healthy(url):
            return
        time.sleep(0.3)
    log = Path(PREFECT_HOME.value()) / "rgcp-server.log"
    raise RgcpError(
        f"The local Prefect server did not start within {START_SECONDS:.0f} s; its log is {log}. "
        "Start one by hand (prefect server start) and set PREFECT_API_URL to it."
    )


def healthy(url: str) -> bool:
    """Whether a Prefect API answers at ``url``."""
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


@lru_cache(maxsize=1)
def own_port() -> int:
    """The port of this process's servers; always the same, since Prefect sends its events to the first address."""
    return free_port()


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_recorded(flow_run_id: UUID, task_runs: int, seconds: float = 120.0) -> int:
    """Wait until the API knows ``task_runs`` finished task runs of a flow run; return how many it knows in the end.

    A server writes task runs from a queue, seconds after they happened; stopped too early it would lose them.
    """
    known = 0
    end = time.monotonic() + seconds
    wanted = {
        "flow_runs": {"id": {"any_": [str(flow_run_id)]}},
        "task_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}},
    }
    with get_client(sync_client=True) as client:
        while known < task_runs and time.monotonic() < end:
            known = int(client.request("POST", "/task_runs/count", json=wanted).json())
            time.sleep(0.25)
    return known
