"""Constraining a prior: fine-tuning it on anchor images near the unknown clean picture (paper, section 3.2)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rgcp_core.errors import UserError
from rgcp_core.loss import denoising_loss
from rgcp_core.precision import Precision, at_precision
from rgcp_core.prior import Prior
from rgcp_core.randomness import randn, stream

Progress = Callable[[int, int], None]
LearningRateDecay = Literal["none", "linear"]


@dataclass(frozen=True)
class Constrained:
    """A constrained prior and how the fitting went."""

    prior: Prior
    losses: Tensor
    """(iterations,) noise error of each step, on the CPU; it jumps with the times that the step drew."""
    loss_start: float
    """Noise error of the unmodified prior on the anchors, at fixed times and noise."""
    loss_end: float
    """The same of the constrained one: what the fine-tuning has achieved."""


def constrain_prior(
    prior: Prior,
    anchors: Tensor,
    *,
    iterations: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    unit: str,
    t_end: int | None = None,
    learning_rate_decay: LearningRateDecay = "none",
    precision: Precision = "float32",
    on_step: Progress | None = None,
) -> Constrained:
    """Fine-tune a copy of ``prior`` on ``anchors`` with the diffusion loss; the prior itself is not changed.

    Adam without weight decay, no flips, the raw weights and not an average of them (Table 1, released code).

    Args:
        prior: the unmodified prior.
        anchors: (N,3,H,W) in [-1,1]: a generative or a personal album.
        iterations: optimiser steps (3000 at 256 px; 5000 personal); 0 returns the prior as it is.
        batch_size: anchors a step, drawn with replacement (4).
        learning_rate: of Adam (1e-5).
        seed: seed of the run.
        unit: whose album this is; with the seed it decides every draw.
        t_end: draw times uniformly from 0..t_end-1. None: all T, as the paper does. A restoration from step K never
            visits t >= K.
        learning_rate_decay: ``linear`` to zero as the released code, ``none`` as the paper's table.
        precision: what the network computes in; its weights and Adam's moments are float32 either way.
        on_step: progress callback.

    Raises:
        UserError: no anchors, anchors of another size than the prior's, or a loss that is not finite.
    """
    size = prior.card.image_size
    if anchors.ndim != 4 or len(anchors) == 0 or tuple(anchors.shape[1:]) != (3, size, size):
        raise UserError(f"Anchors must be (N,3,{size},{size}) with N > 0; got {tuple(anchors.shape)}.")
    t_end = prior.schedule.steps if t_end is None else t_end
    device = next(prior.network.parameters()).device
    anchors = anchors.to(device)
    loss_start = album_loss(prior, anchors, t_end)
    if iterations == 0:
        return Constrained(prior, torch.empty(0), loss_start, loss_start)
    network = copy.deepcopy(prior.network).train().requires_grad_(True)
    model = at_precision(network, precision)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)
    draws = stream(seed, unit, "constrain")
    losses = torch.empty(iterations, device=device)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(stream(seed, unit, "dropout").initial_seed())
        for i in range(iterations):
            if learning_rate_decay == "linear":
                optimizer.param_groups[0]["lr"] = learning_rate * (1 - i / iterations)
            rows = torch.randint(len(anchors), (batch_size,), generator=draws).to(device)
            t = torch.randint(t_end, (batch_size,), generator=draws).to(device)
            eps = torch.randn((batch_size, *anchors.shape[1:]), generator=draws).to(device)
            loss = denoising_loss(model, anchors[rows], t, eps, prior.schedule)
            loss.total.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[i] = loss.mse.detach().mean()
            if on_step is not None:
                on_step(i + 1, iterations)

    losses = losses.cpu()
    if not bool(losses.isfinite().all()):
        raise UserError(
            f"Fine-tuning diverged: the loss is not finite from step {int((~losses.isfinite()).nonzero()[0])} on. "
            f"Lower the learning rate (now {learning_rate:g})."
        )
    constrained = replace(prior, network=network.eval().requires_grad_(False))
    return Constrained(constrained, losses, loss_start, album_loss(constrained, anchors, t_end))


@torch.no_grad()
def album_loss(prior: Prior, anchors: Tensor, t_end: int) -> float:
    """Noise error on the anchors (N,3,H,W), each at one of N times spread evenly over 0..t_end-1, with fixed noise."""
    fractions = (torch.arange(len(anchors), device=anchors.device) + 0.5) / len(anchors)
    noise = randn([stream(0, str(i), "album loss") for i in range(len(anchors))], anchors.shape[1:], anchors.device)
    t = (fractions * t_end).long()
    return float(denoising_loss(prior.network, anchors, t, noise, prior.schedule).mse.mean())
