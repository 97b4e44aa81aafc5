"""How far a face is, for whoever watches within the same process; elsewhere nobody listens and nothing happens."""

from collections.abc import Callable

Listener = Callable[[str, str, float], None]
_listeners: list[Listener] = []


def tell(unit: str, stage: str, fraction: float) -> None:
    """Say that ``stage`` of ``unit`` is done to ``fraction`` (0..1)."""
    for listener in _listeners:
        listener(unit, stage, fraction)


def listen(listener: Listener) -> Callable[[], None]:
    """Add a listener; call the result to remove it."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)
