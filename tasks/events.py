"""Between a run and its tasks within one process: how far a face is, and that the work should stop.

Elsewhere (a Dask worker) nobody listens and nothing happens.
"""

import threading
from collections.abc import Callable

from rgcp_core.errors import RgcpError

Listener = Callable[[str, str, float], None]
_listeners: list[Listener] = []
_stop = threading.Event()


class Stopped(RgcpError):
    """The run was told to stop; what is finished stays, and the same command goes on from there."""


def tell(unit: str, stage: str, fraction: float) -> None:
    """Say that ``stage`` of ``unit`` is done to ``fraction`` (0..1); raises `Stopped` when the run should stop."""
    check_stop()
    for listener in _listeners:
        listener(unit, stage, fraction)


def listen(listener: Listener) -> Callable[[], None]:
    """Add a listener; call the result to remove it."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def stop_work(stop: bool = True) -> None:
    """Let the tasks of this process end at their next step (a thread cannot be ended from outside), or work again."""
    if stop:
        _stop.set()
    else:
        _stop.clear()


def check_stop() -> None:
    """Raise `Stopped` when the run should stop."""
    if _stop.is_set():
        raise Stopped("The run was told to stop.")
