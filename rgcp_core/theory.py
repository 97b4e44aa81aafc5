"""The supplement's theory (section E) as tools: what a noise step hides, what it costs, and a K for a damage.

Throughout, ``alphas_cumprod`` is the schedule's (T,) tensor, falling with t, and ``noise_step`` is K in 1..T,
which noises with ``alphas_cumprod[K - 1]``. SNR is abar / (1 - abar). Pictures are in [-1,1].
"""

import math
from typing import Literal

import numpy as np
import torch
from scipy.fft import dctn
from torch import Tensor

from rgcp_core.errors import UserError

NoiseStep = int | Literal["auto"]
"""A setting's K: stated, or picked for each face by `pick_noise_step`."""

KL_BUDGET = 4800.0
"""Nats per picture that `pick_noise_step` leaves: those that K = 200 at 256 px leaves of a 22 dB damage.

By Eq. 3, SNR(200) / 2 * 3 * 256^2 * 4 * 10^-2.2 with linear betas (a PSNR in [-1,1] has peak 2).
"""

AUTO_RANGE = (100, 400)
"""Bounds of an automatic K at 256 px; `equal_snr_step` moves them to other sizes (23..147 at 64 px)."""


def kl_noised(alphas_cumprod: Tensor, distance_squared: float) -> Tensor:
    """KL(q(x_t|x_0), q(y_t|y_0)) in nats at every t (Eq. 3): what noise leaves of a difference.

    Args:
        alphas_cumprod: (T,).
        distance_squared: ||x_0 - y_0||^2, summed over pixels and channels for the KL per picture, their
            mean for the KL per dimension.

    Returns:
        (T,) float64, falling with t.
    """
    return distance_squared / 2 * _snr(alphas_cumprod)


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
    log_snr = _snr(alphas_cumprod).log()
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


def estimate_damage(y: Tensor, album: Tensor) -> float:
    """Estimate ||x_0 - y||^2, the damage of ``y``, from an album of clean pictures of the face.

    The album's mean m is a blurred estimate of x_0, and its spread about m says how much detail a clean
    picture has beyond that: energy S. So y should show the energy E = ||y - m||^2 = S. Less means missing
    detail (blur, shrinking), more means something that is not the face's (noise, scratches, blocks, a wrong
    tone): the damage is |E - S|, summed over octaves of spatial frequency, for a blurred picture can be noisy
    too. The plain distance E alone would not do, because blur makes it smaller.

    Right on average for noise and for detail that is wholly gone; too large for detail that is only paler.
    Missing detail and noise within one octave hide each other. A fault that the album shares goes unseen: a
    generative album takes its tone and coarse shapes from y.

    Args:
        y: (3,H,W) in [-1,1].
        album: (N,3,H,W) in [-1,1], N >= 2, any kind of album.

    Returns:
        The squared distance, summed over pixels and channels.

    Raises:
        UserError: album pictures of another shape, or fewer than two.
    """
    if album.ndim != 4 or len(album) < 2 or album.shape[1:] != y.shape:
        wanted = f"two album pictures or more, each like y {tuple(y.shape)}"
        raise UserError(f"Estimating damage needs {wanted}; got {tuple(album.shape)}.")
    pictures = album.detach().double().cpu().numpy()
    mean = pictures.mean(0)
    spread = _energy_by_octave(pictures - mean).sum(0) / (len(pictures) - 1)
    found = _energy_by_octave(y.detach().double().cpu().numpy() - mean)
    found = np.maximum(found - spread / len(pictures), 0)  # without the error of a mean of N
    return float(np.abs(found - spread).sum())


def pick_noise_step(y: Tensor, album: Tensor, alphas_cumprod: Tensor, budget: float = KL_BUDGET) -> int:
    """K for ``noise_step: auto``: the smallest that hides the estimated damage of ``y``, within bounds.

    `estimate_damage` gives the distance, Eq. 3 the KL per picture, ``budget`` what may be left of it; so more
    damage never gives a smaller K. `AUTO_RANGE`, moved to the picture's shorter side, bounds the answer:
    below, nothing of the prior enters the picture; above, the person is lost.

    Args:
        y: (3,H,W) in [-1,1], the degraded face.
        album: (N,3,H,W) in [-1,1], its anchors.
        alphas_cumprod: (T,).
        budget: nats per picture; a smaller one gives a larger K.
    """
    size = min(y.shape[-2:])
    lowest, highest = (equal_snr_step(alphas_cumprod, bound, 256, size) for bound in AUTO_RANGE)
    still_above = kl_noised(alphas_cumprod, estimate_damage(y, album)) > budget
    return min(max(int(still_above.sum()) + 1, lowest), highest)


def noise_step_for(noise_step: NoiseStep, y: Tensor, anchors: Tensor | None, alphas_cumprod: Tensor) -> int:
    """The K of one face: the one that the settings state, or for ``auto`` the one that its damage asks for.

    Args:
        noise_step: of the settings.
        y: (3,H,W) in [-1,1], the degraded face.
        anchors: (N,3,H,W) in [-1,1], its album; needed by ``auto``.
        alphas_cumprod: (T,).

    Raises:
        UserError: ``auto`` without an album of two pictures or more.
    """
    if noise_step != "auto":
        return noise_step
    if anchors is None:
        raise UserError("restore.noise_step: auto estimates the damage with an album, and there is none. State a K.")
    return pick_noise_step(y, anchors, alphas_cumprod)


def largest_noise_step(noise_step: NoiseStep, alphas_cumprod: Tensor, size: int) -> int:
    """The largest K that a setting can lead to for pictures of ``size`` px: for plans and estimates."""
    return equal_snr_step(alphas_cumprod, AUTO_RANGE[1], 256, size) if noise_step == "auto" else noise_step


def _snr(alphas_cumprod: Tensor) -> Tensor:
    abar = alphas_cumprod.double()
    return abar / (1 - abar)


def _energy_by_octave(pictures: np.ndarray) -> np.ndarray:
    """Energy (..., bands) of pictures (...,3,H,W) by octave of radial frequency, lowest first.

    The bands sum to the energy. A cosine transform, because a Fourier transform takes the jump from one
    border to the opposite one for detail.
    """
    height, width = pictures.shape[-2:]
    energy = (dctn(pictures, axes=(-2, -1), norm="ortho") ** 2).sum(-3)
    frequency = np.hypot(np.arange(height)[:, None] / height, np.arange(width)[None, :] / width)
    octave = np.log2(np.maximum(frequency * max(height, width), 1)).astype(int)
    return np.stack([energy[..., octave == band].sum(-1) for band in range(octave.max() + 1)], axis=-1)
