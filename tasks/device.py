"""The accelerator of this process: which one, whose turn it is, and the prior loaded on it once."""

import copy
import resource
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import torch
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError
from torch import Tensor

from rgcp_core.errors import UnitError, UserError
from rgcp_core.prior import Prior, find_prior
from rgcp_core.unet import UNet
from tasks.events import check_stop
from tasks.job import Job
from tasks.units import FaceFound, Failure, PhotoFound, attempt, units_of

TOGETHER = 8  # faces that share a batch at most: a kill costs the work of so many
LEASE_SECONDS = 60.0  # a slot whose holder was killed is free again after this

_device_lock = threading.Lock()  # tasks of one process do not share the accelerator


def for_each_face(
    work: Callable[[Job, Prior, FaceFound], None],
    job: Job,
    found: Sequence[PhotoFound],
    failures: dict[str, Failure],
    together: Callable[[Job, Prior, Sequence[FaceFound]], None] | None = None,
) -> dict[str, Failure]:
    """Call ``work`` for every face that has not failed; return the failures so far and the new ones.

    ``together`` is called first, with all of them, and may do some of the work in a way that is faster. A face that
    does not fit into the device's memory fails alone: the next one is tried.
    """
    failures = dict(failures)
    faces = units_of(found, failures)
    if not faces:
        return failures
    device = pick_device(job.device)

    def work_within_memory(face: FaceFound) -> None:
        try:
            work(job, prior, face)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UnitError("out_of_memory", f"The device ({device}) has too little memory: {error}") from None

    with _device_lock, device_slot(device):
        prior = loaded_prior(job.prior, device)
        if together is not None:
            together(job, prior, list(faces.values()))
        for unit, face in faces.items():
            check_stop()
            failure = attempt(lambda face=face: work_within_memory(face))  # type: ignore[misc]
            if failure is not None:
                failures[unit] = failure
                free_memory()
    return failures


def pick_device(name: str) -> torch.device:
    """``auto`` takes the first CUDA device, else the CPU. Chosen inside the task, on the machine that runs it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device("cpu" if name == "stub" else name)
    except RuntimeError as error:
        raise UserError(f"Unknown device {name!r}: expected auto, cpu, cuda, cuda:N or stub.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"The device {name!r} was asked for, but no CUDA device is there.")
    return device


@contextmanager
def device_slot(device: torch.device) -> Iterator[None]:
    """Hold the accelerator: a Prefect concurrency limit of one slot keeps other processes and runs off it.

    The limit ``rgcp-<machine>-cuda:N`` is made when it is missing; who wants two tasks at a time on a large
    accelerator raises it in the Prefect UI. A CPU needs none: threads take turns by the lock of this module.
    """
    if device.type != "cuda":
        yield
        return
    with slot(f"rgcp-{socket.gethostname()}-cuda:{device.index or 0}"):
        yield


@contextmanager
def slot(limit: str) -> Iterator[None]:
    """Hold one slot of a Prefect concurrency limit; it is made, with one slot, where it does not exist."""
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(limit)
        except ObjectNotFound:
            # Where another task makes it at the same time, this is refused; any other trouble shows when it is used.
            with suppress(ObjectAlreadyExists, PrefectHTTPStatusError):
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=limit, limit=1))
    with concurrency(limit, occupy=1, strict=True, lease_duration=LEASE_SECONDS):
        yield


def gains_by_sharing(device: torch.device) -> bool:
    """Whether larger batches are faster: a CPU is busy with the pictures of one face (docs/performance.md)."""
    return device.type != "cpu"


def in_groups(
    faces: Sequence[FaceFound], work: Callable[[Sequence[FaceFound]], None], *, whole_only: bool = False
) -> None:
    """Call ``work`` with up to `TOGETHER` faces at a time, and with fewer where memory is short.

    A face that would be alone is left: `for_each_face` comes to it, and to what does not fit by twos. With
    ``whole_only`` so is a last group that is smaller: code is compiled for a batch size, and the next has another.
    """
    size = TOGETHER
    while size > 1 and len(faces) >= (size if whole_only else 2):
        check_stop()
        try:
            work(faces[:size])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            size //= 2
            free_memory()
            continue
        faces = faces[size:]


def in_fitting_batches(draw: Callable[[int, int], Tensor], count: int) -> Tensor:
    """``draw(start, end)`` over 0..count in one batch, or in smaller and smaller ones where memory is short.

    Raises:
        UnitError: ``out_of_memory``, when not even one at a time fits.
    """
    size = count
    while True:
        try:
            return torch.cat([draw(i, min(i + size, count)) for i in range(0, count, size)])
        except Exception as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        size = (size + 1) // 2
        free_memory()


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device, or the machine in PyTorch's name, had too little memory."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def free_memory() -> None:
    """Give cached memory back to the accelerator, if there is one, so that the next attempt finds it in one piece."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


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


def work_network(job: Job, prior: Prior) -> UNet | None:
    """The one network that takes the weights of face after face in place, where code is compiled for it; else none."""
    device = next(prior.network.parameters()).device
    return _work_network(find_prior(job.prior), device) if job.settings.compiled else None


@lru_cache(maxsize=1)
def _work_network(folder: Path, device: torch.device) -> UNet:
    return copy.deepcopy(_load(folder, device).network)
