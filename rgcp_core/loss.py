"""The training loss of improved DDPM (Nichol & Dhariwal 2021): noise error plus the bound for the variance."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rgcp_core.schedule import Schedule, learned_log_variance

Model = Callable[[Tensor, Tensor], Tensor]
"""``model(x_t (N,3,H,W), t (N,)) -> (N,3,H,W)`` noise, or (N,6,H,W) noise and variance interpolation."""


class DenoisingLoss(NamedTuple):
    """Per-sample losses (N,)."""

    mse: Tensor
    """Mean squared error of the noise: L_simple."""
    vb: Tensor
    """Variational bound at t in bits per dimension; moves the variance only. Zero without a learned variance."""

    @property
    def total(self) -> Tensor:
        """L_simple + 0.001 L_vlb for T = 1000 (Nichol & Dhariwal 2021, Eq. 16), as guided-diffusion trains."""
        return self.mse + self.vb


def denoising_loss(model: Model, x_0: Tensor, t: Tensor, eps: Tensor, schedule: Schedule) -> DenoisingLoss:
    """Loss of ``model`` for clean pictures ``x_0`` (N,3,H,W) in [-1,1], noised to ``t`` (N,) with ``eps``."""
    x_t = schedule.q_sample(x_0, t, eps)
    output = model(x_t, t).float()
    eps_pred = output[:, : x_0.shape[1]]
    mse = (eps_pred - eps).square().flatten(1).mean(1)
    if output.shape[1] == x_0.shape[1]:
        return DenoisingLoss(mse, torch.zeros_like(mse))
    v = output[:, x_0.shape[1] :]
    return DenoisingLoss(mse, _variational_bound(x_0, x_t, t, eps_pred.detach(), v, schedule))


def _variational_bound(x_0: Tensor, x_t: Tensor, t: Tensor, eps_pred: Tensor, v: Tensor, schedule: Schedule) -> Tensor:
    """KL(q(x_{t-1}|x_t,x_0) || p(x_{t-1}|x_t)), or -log p(x_0|x_1) at t = 0; bits per dimension, (N,)."""
    s = t - 1
    first = t == 0
    true = schedule.posterior(x_0, x_t, t, s)
    # At t = 0 the posterior has no variance; guided-diffusion uses the one of t = 1 there, and so do checkpoints.
    floor_t = t.clamp(min=1)
    lower = schedule.posterior(x_0, x_t, floor_t, floor_t - 1).log_variance
    log_variance = learned_log_variance(v, lower, schedule.log_beta(t, s, x_t))
    mean = schedule.posterior(schedule.predict_x0(x_t, t, eps_pred), x_t, t, s).mean

    kl = 0.5 * (
        log_variance - lower - 1 + torch.exp(lower - log_variance) + (true.mean - mean).square() / log_variance.exp()
    )
    nll = -discretized_log_likelihood(x_0, mean, log_variance)
    bits = torch.where(first.view(-1, 1, 1, 1), nll, kl) / math.log(2)
    return bits.flatten(1).mean(1)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability of 8-bit levels ``x`` (scaled to [-1,1]) under a Gaussian (Ho et al. 2020, Eq. 13)."""
    inverse_std = torch.exp(-0.5 * log_variance)
    upper = torch.special.ndtr((x - mean + 1 / 255) * inverse_std)
    lower = torch.special.ndtr((x - mean - 1 / 255) * inverse_std)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()
