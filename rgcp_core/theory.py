"""The supplement's theory (section E) as tools: what a noise step hides, what it costs, and a K for a damage.

Throughout, ``alphas_cumprod`` is the schedule's (T,) tensor, falling with t, and ``noise_step`` is K in 1..T,
which noises with ``alphas_cumprod[K - 1]``. SNR is abar / (1 - abar). Pictures are in [-1,1].
"""

import math

import torch
from torch import Tensor

from rgcp_core.errors import UserError

KL_BUDGET = 4800.0
"""Nats per picture that may be left of a damage: those that K = 200 at 256 px leaves of a 22 dB damage.

By Eq. 3, SNR(200) / 2 * 3 * 256^2 * 4 * 10^-2.2 with linear betas (a PSNR in [-1,1] has peak 2).
"""


def kl_noised(alphas_cumprod: Tensor, distance_squared: float) -> Tensor:
    """KL(q(x_t|x_0), q(y_t|y_0)) in nats at every t (Eq. 3): what noise leaves of a difference.

    Args:
        alphas_cumprod: (T,).
        distance_squared: ||x_0 - y_0||^2, summed over pixels and channels for the KL per picture, their
            mean for the KL per dimension.

    Returns:
        (T,) float64, falling with t.
    """
    return distance_squared / 2 * snr(alphas_cumprod)


def entropy_per_dim(alphas_cumprod: Tensor) -> Tensor:
    """Entropy of q(x_t|x_0) in nats per dimension at every t, (T,) float64 (Eq. 5): the price of K."""
    return 0.5 * torch.log(2 * math.pi * (1 - alphas_cumprod.double())) + 0.5


def equal_snr_step(alphas_cumprod: Tensor, noise_step: int, size_from: int, size_to: int) -> int:
    """The step that means at ``size_to`` px what ``noise_step`` means at ``size_from`` px.

    Holds SNR(K) * size^2 constant: neighbouring pixels average noise out, so a larger picture needs more. By
    Eq. 3 that is an equal KL per picture for an equal damage per pixel. The nearest step in log SNR is taken,
    so the ends of the schedule bound the answer.

    Raises:
        UserError: a noise_step outside 1..T or a size below 1 px.
    """
    steps = len(alphas_cumprod)
    if not 1 <= noise_step <= steps:
        raise UserError(f"noise_step must lie between 1 and T = {steps}; got {noise_step}.")
    if min(size_from, size_to) < 1:
        raise UserError(f"Sizes are in pixels, 1 or more; got {size_from} and {size_to}.")
    log_snr = snr(alphas_cumprod).log()
    wanted = log_snr[noise_step - 1] + 2 * math.log(size_from / size_to)
    return int((log_snr - wanted).abs().argmin()) + 1


def step_for_kl(alphas_cumprod: Tensor, distance_squared: float, budget: float) -> int:
    """The smallest noise_step at which the KL of Eq. 3 is at most ``budget`` nats.

    Distance and budget go together: both per picture (sums; the meaning that carries over to other sizes, see
    `equal_snr_step`) or both per dimension (means).

    Raises:
        UserError: when even step T leaves more, or for a budget that is not above 0.
    """
    if not budget > 0:
        raise UserError(f"A KL budget must be above 0 nats; got {budget:g}.")
    kl = kl_noised(alphas_cumprod, distance_squared)
    if kl[-1] > budget:
        left = f"a KL of {kl[-1]:.3g} nats"
        raise UserError(f"Even step T = {len(kl)} leaves {left}; the budget is {budget:g}. Raise the budget.")
    return int((kl > budget).sum()) + 1


def snr(alphas_cumprod: Tensor) -> Tensor:
    """Signal to noise ratio abar / (1 - abar) at every t, (T,) float64, falling."""
    abar = alphas_cumprod.double()
    return abar / (1 - abar)
