import math

import pytest
import torch

from rgcp_core.errors import UserError
from rgcp_core.schedule import Schedule, check_noise_step, visited_times


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return Schedule.linear()


def test_linear_schedule_is_the_tables(schedule: Schedule) -> None:
    assert schedule.steps == 1000
    beta = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    assert schedule.betas.tolist() == pytest.approx(beta)
    assert float(schedule.alphas_cumprod[199]) == pytest.approx(math.prod(1 - b for b in beta[:200]))


def test_noising_follows_the_equation(schedule: Schedule) -> None:
    x_0, eps = torch.tensor([[[[0.5]]]]), torch.tensor([[[[-2.0]]]])
    abar = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(300))
    x_t = schedule.q_sample(x_0, torch.tensor([299]), eps)
    assert float(x_t) == pytest.approx(math.sqrt(abar) * 0.5 - 2 * math.sqrt(1 - abar), rel=1e-5)


def test_predict_x0_undoes_noising(schedule: Schedule) -> None:
    x_0, eps = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    t = torch.tensor([0, 10, 200, 600, 900])
    back = schedule.predict_x0(schedule.q_sample(x_0, t, eps), t, eps)
    assert torch.allclose(back, x_0, atol=2e-4)


@pytest.mark.parametrize(("t", "s"), [(5, 4), (200, 199), (600, 580), (40, 3)])
def test_posterior_is_bayes_rule(schedule: Schedule, t: int, s: int) -> None:
    """q(x_s|x_t,x_0) is the product of q(x_s|x_0) and q(x_t|x_s) as functions of x_s: precisions add."""
    abar_t, abar_s = float(schedule.alphas_cumprod[t]), float(schedule.alphas_cumprod[s])
    alpha = abar_t / abar_s
    x_0, x_t = 0.3, -0.8
    precision = 1 / (1 - abar_s) + alpha / (1 - alpha)
    mean = (math.sqrt(abar_s) * x_0 / (1 - abar_s) + math.sqrt(alpha) * x_t / (1 - alpha)) / precision
    picture = torch.ones(1, 3, 1, 1)
    posterior = schedule.posterior(x_0 * picture, x_t * picture, torch.tensor([t]), torch.tensor([s]))
    assert posterior.mean.flatten().tolist() == pytest.approx([mean] * 3, rel=1e-5)
    assert float(posterior.log_variance) == pytest.approx(-math.log(precision), rel=1e-4)


def test_last_step_is_the_clean_estimate(schedule: Schedule) -> None:
    x_0, x_t = torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 2)
    posterior = schedule.posterior(x_0, x_t, torch.tensor([7]), torch.tensor([-1]))
    assert torch.allclose(posterior.mean, x_0)
    assert float(posterior.log_variance) == -math.inf


def test_visited_times() -> None:
    assert visited_times(4) == [3, 2, 1, 0]
    assert visited_times(600, 30)[0] == 599
    assert visited_times(600, 30)[-1] == 0
    assert len(set(visited_times(600, 30))) == 30
    with pytest.raises(UserError, match="two steps"):
        visited_times(10, 1)


@pytest.mark.parametrize("noise_step", [0, -1, 1001])
def test_noise_step_beyond_the_schedule_is_refused(schedule: Schedule, noise_step: int) -> None:
    with pytest.raises(UserError, match="between 1 and the prior's T = 1000"):
        check_noise_step(noise_step, schedule)
