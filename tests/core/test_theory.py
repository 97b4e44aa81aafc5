"""The supplement's formulas against torch.distributions, the table of K by size, and known damage."""

import math

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from rgcp_core import theory
from rgcp_core.errors import UserError

ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def normal(*shape: int, seed: int, std: float = 1.0) -> Tensor:
    return std * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_kl_is_that_of_the_two_gaussians() -> None:
    x_0, y_0 = normal(3, 8, 8, seed=0), normal(3, 8, 8, seed=1)
    kl = theory.kl_noised(ALPHAS_CUMPROD, float((x_0 - y_0).square().sum()))
    assert kl.shape == (1000,)
    for t in (0, 51, 199, 599, 999):
        abar = ALPHAS_CUMPROD[t]
        q = Normal(abar.sqrt() * x_0, (1 - abar).sqrt())
        q_degraded = Normal(abar.sqrt() * y_0, (1 - abar).sqrt())
        torch.testing.assert_close(kl[t], kl_divergence(q, q_degraded).sum())
    assert (kl.diff() < 0).all()


def test_entropy_is_that_of_the_gaussian() -> None:
    entropy = theory.entropy_per_dim(ALPHAS_CUMPROD)
    for t in (0, 51, 199, 599, 999):
        torch.testing.assert_close(entropy[t], Normal(0.0, (1 - ALPHAS_CUMPROD[t]).sqrt()).entropy())
    assert (entropy.diff() > 0).all()


@pytest.mark.parametrize(
    ("noise_step", "expected"),
    [(200, {512: 331, 256: 200, 128: 106, 64: 52}), (600, {512: 704, 256: 600, 128: 480, 64: 344})],
)
def test_equal_snr_step_reproduces_the_table(noise_step: int, expected: dict[int, int]) -> None:
    steps = {size: theory.equal_snr_step(ALPHAS_CUMPROD, noise_step, 256, size) for size in expected}
    assert steps == expected


def test_equal_snr_step_stays_on_the_schedule_and_rejects_nonsense() -> None:
    assert theory.equal_snr_step(ALPHAS_CUMPROD, 10, 256, 1) == 1
    assert theory.equal_snr_step(ALPHAS_CUMPROD, 1000, 64, 1024) == 1000
    for noise_step, size in ((0, 64), (1001, 64), (200, 0)):
        with pytest.raises(UserError):
            theory.equal_snr_step(ALPHAS_CUMPROD, noise_step, 256, size)


def test_step_for_kl_is_the_smallest_within_the_budget() -> None:
    """By hand: K is the first step with abar / (1 - abar) <= c = 2 budget / d^2, so abar <= c / (1 + c)."""
    for distance_squared, budget in ((100.0, 1.0), (3.0, 7.5), (0.01, 1000.0), (4e4, 20.0)):
        c = 2 * budget / distance_squared
        k = theory.step_for_kl(ALPHAS_CUMPROD, distance_squared, budget)
        assert ALPHAS_CUMPROD[k - 1] <= c / (1 + c)
        assert k == 1 or ALPHAS_CUMPROD[k - 2] > c / (1 + c)
    per_image = theory.step_for_kl(ALPHAS_CUMPROD, 100.0, 5.0)
    assert theory.step_for_kl(ALPHAS_CUMPROD, 100.0 / 192, 5.0 / 192) == per_image
    with pytest.raises(UserError, match="Raise the budget"):
        theory.step_for_kl(ALPHAS_CUMPROD, 1e9, 1.0)
    with pytest.raises(UserError, match="above 0"):
        theory.step_for_kl(ALPHAS_CUMPROD, 1.0, 0.0)


@pytest.mark.parametrize(("size", "expected"), [(256, 200), (128, 106), (64, 52)])
def test_the_default_budget_is_the_papers_step_at_22_db(size: int, expected: int) -> None:
    distance_squared = 3 * size**2 * 2**2 / 10 ** (22 / 10)
    k = theory.step_for_kl(ALPHAS_CUMPROD, distance_squared, theory.KL_BUDGET)
    assert k == pytest.approx(expected, abs=1)


# Damage with a known answer: clean pictures are a base and white detail of variance 0.04.

DETAIL = 0.2
SIZE = 32
CLEAN_ENERGY = 3 * SIZE**2 * DETAIL**2


def base() -> Tensor:
    across = torch.linspace(-0.5, 0.5, SIZE, dtype=torch.float64)
    return across.expand(3, SIZE, SIZE) + 0.2 * torch.tensor([1.0, 0.0, -1.0])[:, None, None]


def album(count: int = 16) -> Tensor:
    return base() + normal(count, 3, SIZE, SIZE, seed=5, std=DETAIL)


CLEAN = base() + normal(3, SIZE, SIZE, seed=6, std=DETAIL)


def test_a_clean_picture_shows_hardly_any_damage() -> None:
    assert theory.estimate_damage(CLEAN, album()) < 0.1 * CLEAN_ENERGY


@pytest.mark.parametrize("sigma", [0.15, 0.4])
def test_damage_of_noise_is_its_energy(sigma: float) -> None:
    noise = normal(3, SIZE, SIZE, seed=7, std=sigma)
    damage = theory.estimate_damage(CLEAN + noise, album())
    assert damage == pytest.approx(3 * SIZE**2 * sigma**2, rel=0.1)


@pytest.mark.parametrize("count", [4, 16])
def test_damage_of_lost_detail_is_its_energy(count: int) -> None:
    """Where the plain distance to the album's mean would see a nearly perfect picture."""
    assert theory.estimate_damage(base(), album(count)) == pytest.approx(CLEAN_ENERGY, rel=0.05)
    assert (base() - album(count).mean(0)).square().sum() < 1.2 * CLEAN_ENERGY / count


def test_damage_of_a_shifted_tone_is_its_energy() -> None:
    shifted = CLEAN + 0.3
    damage = theory.estimate_damage(shifted, album()) - theory.estimate_damage(CLEAN, album())
    assert damage == pytest.approx(3 * SIZE**2 * 0.3**2, rel=0.1)


def test_damage_and_step_grow_with_noise_and_with_blur() -> None:
    noise = normal(3, SIZE, SIZE, seed=8)
    noisy = [CLEAN + level * noise for level in (0, 0.1, 0.2, 0.4, 0.8)]
    blurred = [torch.from_numpy(gaussian_filter(CLEAN.numpy(), (0, s, s))) for s in (0.01, 0.5, 0.8, 1.5, 3)]
    for series in (noisy, blurred):
        damages = [theory.estimate_damage(y, album()) for y in series]
        assert damages == sorted(damages)
        steps = [theory.pick_noise_step(y, album(), ALPHAS_CUMPROD) for y in series]
        assert steps == sorted(steps)
        assert steps[-1] > steps[0]


def test_picked_step_is_that_of_eq_3_within_the_bounds_of_the_size() -> None:
    lowest, highest = (theory.equal_snr_step(ALPHAS_CUMPROD, k, 256, SIZE) for k in (100, 400))
    y = CLEAN + normal(3, SIZE, SIZE, seed=9, std=0.3)
    expected = theory.step_for_kl(ALPHAS_CUMPROD, 3 * SIZE**2 * 0.3**2, 3000.0)
    assert lowest < expected < highest
    assert theory.pick_noise_step(y, album(), ALPHAS_CUMPROD, budget=3000.0) == pytest.approx(expected, abs=2)
    assert theory.pick_noise_step(y, album(), ALPHAS_CUMPROD, budget=1e9) == lowest
    assert theory.pick_noise_step(y, album(), ALPHAS_CUMPROD, budget=1e-9) == highest


def test_damage_needs_an_album_that_fits() -> None:
    for wrong in (album(1), album()[:, :, :16], album()[0]):
        with pytest.raises(UserError, match="two album pictures"):
            theory.estimate_damage(CLEAN, wrong)


def test_octaves_hold_all_energy_and_separate_frequencies() -> None:
    """A cosine of the transform at 4 to 7 half-periods a side lies in the third octave (1, 2-3, 4-7, ...)."""
    column = torch.arange(SIZE, dtype=torch.float64) + 0.5
    wave = torch.cos(math.pi * 5 * column / SIZE).expand(3, SIZE, SIZE).numpy()
    energy = theory._energy_by_octave(wave)
    assert energy.sum() == pytest.approx((wave**2).sum())
    assert energy[2] == pytest.approx((wave**2).sum())
