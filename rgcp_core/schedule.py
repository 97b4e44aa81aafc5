"""The Gaussian diffusion of DDPM: betas, noising, the estimate of x_0 and the posterior.

Times are indices ``t`` in 0..T-1. "Noising to step K" in the paper means index ``t = K - 1``.
All constants are float64 and are cast when they meet a picture.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rgcp_core.errors import UserError


@dataclass(frozen=True)
class Posterior:
    """q(x_s | x_t, x_0) for s < t (Ho et al. 2020, Eq. 6-7): a Gaussian with a diagonal covariance."""

    mean: Tensor
    """Same shape as x_t."""
    log_variance: Tensor
    """Broadcasts against the mean; ``-inf`` where s is the clean picture."""


class Schedule:
    """Constants of the forward process ``q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)``.

    Args:
        betas: (T,) variances of the single steps, each in (0, 1).
    """

    def __init__(self, betas: Tensor) -> None:
        betas = betas.to(torch.float64)
        if betas.ndim != 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise UserError("A schedule needs one beta a step, each between 0 and 1.")
        self.betas = betas
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self._tables: dict[torch.device, Tensor] = {}  # one copy a device: no transfer inside a sampling loop

    @classmethod
    def linear(cls, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> "Schedule":
        """Evenly spaced betas (Table 1 of the paper: T = 1000)."""
        return cls(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64))

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return len(self.betas)

    def abar(self, t: Tensor, ndim: int = 4) -> Tensor:
        """alphas_cumprod at times ``t`` (N,), float64, (N,1,...) with ``ndim`` axes; 1 at t = -1, the clean end."""
        if t.device not in self._tables:
            self._tables[t.device] = torch.cat([self.alphas_cumprod, self.alphas_cumprod.new_ones(1)]).to(t.device)
        return self._tables[t.device][t].view(-1, *[1] * (ndim - 1))

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Noise ``x_0`` (N,C,H,W) to times ``t`` (N,) with standard normal ``eps``: Eq. 1 of the paper."""
        abar = self.abar(t, x_0.ndim)
        return abar.sqrt().to(x_0.dtype) * x_0 + (1 - abar).sqrt().to(x_0.dtype) * eps

    def predict_x0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The clean picture that ``x_t`` and its noise ``eps`` imply: q_sample solved for x_0."""
        abar = self.abar(t, x_t.ndim)
        return abar.rsqrt().to(x_t.dtype) * x_t - ((1 - abar) / abar).sqrt().to(x_t.dtype) * eps

    def posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Posterior:
        """q(x_s | x_t, x_0) for any s < t; with s = t - 1 the DDPM posterior, with larger strides the respaced one.

        Args:
            x_0: (N,C,H,W) clean pictures.
            x_t: (N,C,H,W) states at ``t``.
            t: (N,) times.
            s: (N,) earlier times; -1 is the clean picture.
        """
        abar_t, abar_s = self.abar(t, x_t.ndim), self.abar(s, x_t.ndim)
        alpha = abar_t / abar_s
        weight_x0 = abar_s.sqrt() * (1 - alpha) / (1 - abar_t)
        weight_xt = alpha.sqrt() * (1 - abar_s) / (1 - abar_t)
        variance = (1 - alpha) * (1 - abar_s) / (1 - abar_t)
        mean = weight_x0.to(x_t.dtype) * x_0 + weight_xt.to(x_t.dtype) * x_t
        return Posterior(mean, variance.log().to(x_t.dtype))

    def log_beta(self, t: Tensor, s: Tensor, like: Tensor) -> Tensor:
        """log of the forward variance from s to t, (N,1,1,1): the upper bound of a learned variance."""
        return (1 - self.abar(t, like.ndim) / self.abar(s, like.ndim)).log().to(like.dtype)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio abar / (1 - abar) at times ``t``."""
        abar = self.alphas_cumprod[t]
        return abar / (1 - abar)


def learned_log_variance(v: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Interpolate between log posterior variance and log beta by the network's ``v`` in [-1, 1] (Nichol & Dhariwal
    2021, Eq. 15).
    """
    fraction = (v + 1) / 2
    return fraction * upper + (1 - fraction) * lower


def visited_times(noise_step: int, steps: int | None = None) -> list[int]:
    """Times that a sampler visits from K = ``noise_step`` down, descending from K-1 to 0.

    All K of them when ``steps`` is None, otherwise ``steps``, evenly spaced.

    >>> visited_times(10, 4)
    [9, 6, 3, 0]
    """
    if steps is None or steps >= noise_step:
        return list(range(noise_step - 1, -1, -1))
    if steps < 2:
        raise UserError(f"A strided sampler needs at least two steps; got {steps}.")
    return [round((noise_step - 1) * (steps - 1 - i) / (steps - 1)) for i in range(steps)]


def check_noise_step(noise_step: int, schedule: Schedule) -> None:
    """Raise UserError unless 1 <= noise_step <= T."""
    if not 1 <= noise_step <= schedule.steps:
        raise UserError(f"noise_step must lie between 1 and the prior's T = {schedule.steps}; got {noise_step}.")
