"""Does a prior repeat its training pictures? Its samples against those, with held-out pictures as the yardstick."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rgcp_core.errors import UserError
from rgcp_core.training_data import Pictures

NEIGHBOURS = 50
COPY_RATIO = 0.5
"""Of 377 held-out faces at 64 px, 9 lay below 0.22 and were indeed in the training set; the others began at 0.58."""


@dataclass(frozen=True)
class Nearest:
    """The nearest training picture of each of N pictures, mirrored ones included."""

    distance: Tensor
    """(N,) root mean squared difference of pixels in [-1,1]. Smooth pictures are near to everything."""
    ratio: Tensor
    """(N,) that distance over the mean distance of the 50 nearest, which smoothness does not change; near 0: a copy."""
    row: Tensor
    """(N,) row of the nearest training picture."""

    @property
    def copies(self) -> Tensor:
        """(N,) which pictures are copies: their nearest neighbour is far nearer than the 49 after it."""
        return self.ratio < COPY_RATIO


@dataclass(frozen=True)
class MemorisationReport:
    """Nearest training pictures of samples, and of held-out pictures, which cannot have been memorised.

    Copies among the held-out pictures are duplicates in the data; samples should show no larger share, and their
    median ratio should lie near that of held-out pictures.
    """

    samples: Nearest
    heldout: Nearest


def nearest_training(pictures: Tensor, training: Pictures, neighbours: int = NEIGHBOURS) -> Nearest:
    """Find the nearest training picture of each of ``pictures`` (N,3,S,S) in [-1,1].

    Raises:
        UserError: pictures of another size, or no more training pictures than ``neighbours``.
    """
    if pictures.shape[-1] != training.size:
        raise UserError(f"Pictures of {pictures.shape[-1]} px cannot be compared with ones of {training.size} px.")
    if len(training) < neighbours:
        raise UserError(f"The memorisation check needs {neighbours} training pictures or more; got {len(training)}.")
    flat = pictures.flatten(1)
    # A picture and its mirror image count as one: the training may have shown either.
    distances = torch.cat([torch.minimum(*pair) for pair in _distances(flat, training)], dim=1) / flat.shape[1] ** 0.5
    nearest, rows = distances.topk(neighbours, dim=1, largest=False)
    return Nearest(nearest[:, 0], nearest[:, 0] / nearest.mean(1), rows[:, 0])


def check_memorisation(samples: Tensor, heldout: Pictures, training: Pictures) -> MemorisationReport:
    """Compare ``samples`` (N,3,S,S) in [-1,1] and all held-out pictures with the training pictures."""
    held = torch.cat(list(heldout.batches(256)))
    return MemorisationReport(nearest_training(samples.cpu(), training), nearest_training(held, training))


def without_copies(heldout: Pictures, training: Pictures) -> Pictures:
    """The held-out pictures that are not, after all, in the training set too; data sets hold duplicates."""
    fresh = ~nearest_training(torch.cat(list(heldout.batches(256))), training).copies
    if not bool(fresh.any()):
        raise UserError(f"The pictures of {heldout.source} are all in the training set {training.source} as well.")
    encoded: Any = [item for item, keep in zip(heldout.encoded, fresh.tolist(), strict=True) if keep]
    return replace(heldout, encoded=encoded, decoded=None if heldout.decoded is None else heldout.decoded[fresh])


def _distances(flat: Tensor, training: Pictures) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in training.batches(512):
        yield (torch.cdist(flat, batch.flatten(1)), torch.cdist(flat, batch.flip(-1).flatten(1)))
