"""The accelerator of this process: which one, its lock, and the prior loaded on it once."""

import resource
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from rgcp_core.errors import UserError
from rgcp_core.prior import Prior, find_prior
from tasks.job import Job
from tasks.units import FaceFound, Failure, PhotoFound, attempt, units_of

_device_lock = threading.Lock()  # tasks of one process do not share the accelerator


def for_each_face(
    work: Callable[[Job, Prior, FaceFound], None],
    job: Job,
    found: Sequence[PhotoFound],
    failures: dict[str, Failure],
) -> dict[str, Failure]:
    """Call ``work`` for every face that has not failed; return the failures so far and the new ones."""
    failures = dict(failures)
    device = pick_device(job.device)
    with _device_lock:
        prior = loaded_prior(job.prior, device)
        for unit, face in units_of(found, failures).items():
            failure = attempt(lambda face=face: work(job, prior, face))  # type: ignore[misc]
            if failure is not None:
                failures[unit] = failure
    return failures


def pick_device(name: str) -> torch.device:
    """``auto`` takes the first CUDA device, else the CPU. Chosen inside the task, on the machine that runs it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"Unknown device {name!r}: expected auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"The device {name!r} was asked for, but no CUDA device is there.")
    return device


def device_name(device: torch.device) -> str:
    """``cpu`` or the accelerator's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory in use so far: of the accelerator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def loaded_prior(name: str, device: torch.device) -> Prior:
    """The prior on the device, loaded once a process."""
    return _load(find_prior(name), device)


@lru_cache(maxsize=2)
def _load(folder: Path, device: torch.device) -> Prior:
    prior = Prior.load(folder, device)
    prior.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return prior
