"""Random streams per unit, so that neither batch size, chunking, worker count nor resuming changes a picture."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def stream(seed: int, unit: str, purpose: str) -> torch.Generator:
    """A generator of its own for one purpose of one unit (a face), e.g. ``stream(0, unit, "restore")``.

    It lives on the CPU, so that the noise of a face does not depend on the device either.
    """
    digest = hashlib.sha256(f"{seed}/{unit}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def randn(streams: Sequence[torch.Generator], shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Standard normal noise (N, *shape), row i drawn from ``streams[i]`` alone."""
    return send(torch.stack([torch.randn(tuple(shape), generator=generator) for generator in streams]), device)


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor`` (on the CPU) on ``device``; an accelerator is not waited for, so that its queue never runs dry."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
