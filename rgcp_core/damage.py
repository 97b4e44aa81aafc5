"""How damaged a face is, and which noise step that asks for: ``restore.noise_step: auto``.

Clean pictures have a law of detail: how much energy the coarse octaves of spatial frequency hold says, within a
factor, how much the fine ones hold. Blur, shrinking and compression take detail away, noise adds some. So a picture
shows by itself how far it is from a clean one, without a network; only the law has to be known, from some clean
pictures framed as the prior's own (`measure_detail`; `rgcp prior evaluate --write-card` puts it into the card).

What leaves the detail as it is, or adds some that looks like it, is not seen: fading, scratches, mild JPEG blocks.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.fft import dctn
from torch import Tensor

from rgcp_core.degrade import degrade
from rgcp_core.errors import UserError
from rgcp_core.theory import equal_snr_step, snr

REFERENCE_DAMAGE = "blind"
"""The damage that a prior's usual K is meant for: the field's chain of blur, shrinking, noise and JPEG."""
LEAST_NOISE_STEP = 100
"""The smallest automatic K, at 256 px, as in Fig. 8 of the supplement: below, nothing of the prior enters."""
FIRST_FINE = (3, 4)
"""Octaves that the fine detail may begin with: what is below, from the first octave on, says how much there should be.

From three coarse octaves (1 to 8 half-periods a side) it is known better; from two also where blur took the third.
"""
UNUSUAL = 2.0
"""Standard deviations from the law within which a picture counts as clean: 19 of 20 clean ones do."""


class OctaveLaw(BaseModel):
    """How much energy clean pictures have in the fine octaves, by how much they have in the coarse ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: int = Field(description="The first fine octave; 1 up to the one before it are the coarse ones.")
    weights: tuple[tuple[float, ...], ...] = Field(
        description="For each fine octave, log energy = w0 + w1 e1 + w2 e2 + ..., by the coarse log energies e."
    )
    spread: tuple[float, ...] = Field(description="Standard deviation of clean pictures about it, by fine octave.")


class DetailLaw(BaseModel):
    """What detail clean pictures of one size have: part of a prior's card."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    octaves: tuple[OctaveLaw, ...] = Field(description="One for each of `FIRST_FINE`.")
    missing: float = Field(description="Median missing detail of the same pictures under the `blind` damage.")
    pictures: int = Field(description="How many clean pictures it was measured on.")


class Damage(NamedTuple):
    """What is wrong with the detail of a picture; both are 0 for most clean ones."""

    missing: float
    """Energy of the detail that is not there, a value (one channel of one pixel), in units of [-1,1] squared."""
    noise: float
    """Variance of white noise, in units of [-1,1] squared."""


def measure_detail(pictures: Iterable[Tensor]) -> DetailLaw:
    """Find the law from clean pictures, by least squares.

    Args:
        pictures: 20 or more, each (3,S,S) in [-1,1], S >= 16, framed as the prior's own.

    Raises:
        UserError: fewer or smaller pictures.
    """
    clean = list(pictures)
    if len(clean) < 20 or min(min(picture.shape[-2:]) for picture in clean) < 16:
        sizes = sorted({min(picture.shape[-2:]) for picture in clean})
        raise UserError(f"The law of detail needs 20 clean pictures of 16 px or more; got {len(clean)} of {sizes} px.")
    energies = np.log([energy_by_octave(picture) for picture in clean])
    law = DetailLaw(octaves=tuple(_fit(energies, first) for first in FIRST_FINE), missing=1, pictures=len(clean))
    damaged = [degrade(picture, REFERENCE_DAMAGE, i).image for i, picture in enumerate(clean)]
    missing = float(np.median([estimate_damage(y, law).missing for y in damaged]))
    return law.model_copy(update={"missing": missing})


def _fit(log_energies: np.ndarray, first: int) -> OctaveLaw:
    """Least squares over pictures, (N, octaves)."""
    coarse, fine = np.split(log_energies[:, 1:], [first - 1], axis=1)
    coarse = np.column_stack([np.ones(len(coarse)), coarse])
    weights, *_ = np.linalg.lstsq(coarse, fine, rcond=None)
    spread = (fine - coarse @ weights).std(axis=0, ddof=len(weights))
    return OctaveLaw(first=first, weights=tuple(map(tuple, weights.T.tolist())), spread=tuple(spread.tolist()))


def estimate_damage(y: Tensor, law: DetailLaw) -> Damage:
    """Compare the fine detail of a picture with what its coarse detail lets one expect.

    Args:
        y: (3,S,S) in [-1,1], of the size the law was measured at.
        law: of the prior.

    Raises:
        UserError: a picture of another size.
    """
    energies, counts = energy_by_octave(y), octave_counts(*y.shape[-2:])
    found = [_compare(energies, counts, octaves) for octaves in law.octaves]
    return Damage(max(damage.missing for damage in found), min(damage.noise for damage in found))


def _compare(energies: np.ndarray, counts: np.ndarray, law: OctaveLaw) -> Damage:
    """Damage by one of the laws, from energies (octaves,) and how many values each octave has."""
    found = energies[law.first :]
    if len(found) != len(law.spread):
        wanted = 2 ** (law.first + len(law.spread) - 1)
        raise UserError(f"This law of detail is for pictures of {wanted} px, not for others.")
    expected_log = np.array(law.weights) @ [1.0, *np.log(energies[1 : law.first])]
    expected = np.exp(expected_log)
    unusual = (np.log(found) - expected_log) / np.array(law.spread)
    missing = np.where(unusual < -UNUSUAL, expected - found, 0).sum() / counts.sum()
    # White noise is in every octave alike; a face that is merely rich in texture is not at the highest frequencies.
    excess = (found - expected)[-2:] / counts[-2:]
    noise = excess.min() if (unusual[-2:] > UNUSUAL).all() else 0.0
    return Damage(float(missing), float(noise))


def pick_noise_step(y: Tensor, law: DetailLaw, alphas_cumprod: Tensor, usual: int) -> int:
    """The smallest K that hides the damage of ``y`` as well as the usual one hides what it is meant for.

    The noise of step K leaves SNR(K) ||x_0 - y||^2 / 2 of a damage (Eq. 3): it is held at what the usual K leaves of
    `REFERENCE_DAMAGE`, with the missing detail in place of the distance. White noise is noise already: the step whose
    own is as strong hides it. More damage gives no smaller K, until the coarse octaves are lost as well (a 64 px face
    that was shrunk 12 times and more).

    Args:
        y: (3,S,S) in [-1,1], the degraded face.
        law: of the prior.
        alphas_cumprod: (T,).
        usual: K for faces as damaged as those of `REFERENCE_DAMAGE`, and the largest K that is picked.

    Returns:
        K between `LEAST_NOISE_STEP`, carried to the picture's size, and ``usual``.
    """
    damage, by_step = estimate_damage(y, law), snr(alphas_cumprod)
    least = min(equal_snr_step(alphas_cumprod, LEAST_NOISE_STEP, 256, min(y.shape[-2:])), usual)
    left = damage.missing * by_step > law.missing * by_step[usual - 1]
    louder = damage.noise * by_step > 1
    return min(max(int(left.sum()) + 1, int(louder.sum()) + 1, least), usual)


def energy_by_octave(picture: Tensor) -> np.ndarray:
    """Energy (octaves,) of a picture (3,H,W) by octave of radial frequency, the mean first.

    The octaves sum to the energy. A cosine transform, because a Fourier transform takes the jump from one border to
    the opposite one for detail.
    """
    values = picture.detach().double().cpu().numpy()
    energy = (dctn(values, axes=(-2, -1), norm="ortho") ** 2).sum(0)
    octave = _octaves(*energy.shape)
    # A flat picture has no energy at all in most octaves, and a logarithm is taken: a hundredth of an 8-bit level.
    floor = (0.01 / 127.5) ** 2
    return np.array([max(energy[octave == band].sum(), floor) for band in range(octave.max() + 1)])


def octave_counts(height: int, width: int) -> np.ndarray:
    """How many of the 3 H W values of a picture's transform each octave has."""
    return 3 * np.bincount(_octaves(height, width).ravel())


def _octaves(height: int, width: int) -> np.ndarray:
    frequency = np.hypot(np.arange(height)[:, None] / height, np.arange(width)[None, :] / width)
    return np.log2(np.maximum(frequency * max(height, width), 1)).astype(int)
