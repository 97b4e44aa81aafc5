"""The supplement's formulas against torch.distributions, and the table of K by size."""


import pytest
import torch
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
