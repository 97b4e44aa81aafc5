"""The samplers against a Gaussian, whose answer is known exactly."""

import math

import pytest
import torch
from torch import Tensor

from rgcp_core.errors import UserError
from rgcp_core.prior import Prior
from rgcp_core.randomness import randn, stream
from rgcp_core.sampling import Guidance, denoise, generate_album, noise_to, restore, sample
from rgcp_core.schedule import Schedule, visited_times

MU, SIGMA = 0.2, 0.4
SCHEDULE = Schedule.linear()


class GaussianModel:
    """The perfect model of pictures whose pixels are N(MU, SIGMA^2): exact noise, and the exact reverse variance.

    ``times`` are those the sampler visits, since the variance belongs to a step from t to the next one.
    """

    def __init__(self, times: list[int]) -> None:
        self.next = dict(zip(times, [*times[1:], -1], strict=True))

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        now, s = int(t[0]), self.next[int(t[0])]
        abar = float(SCHEDULE.alphas_cumprod[now])
        total = SIGMA**2 * abar + 1 - abar
        eps = math.sqrt(1 - abar) * (x_t - math.sqrt(abar) * MU) / total
        v = torch.zeros_like(x_t)
        if s >= 0:
            abar_s = float(SCHEDULE.alphas_cumprod[s])
            alpha = abar / abar_s
            lower, upper = (1 - alpha) * (1 - abar_s) / (1 - abar), 1 - alpha
            # p(x_s | x_t) of the joint Gaussian: Var(x_s) - Cov(x_s, x_t)^2 / Var(x_t).
            total_s = SIGMA**2 * abar_s + 1 - abar_s
            exact = total_s - alpha * total_s**2 / total
            v = torch.full_like(x_t, 2 * math.log(exact / lower) / math.log(upper / lower) - 1)
        return torch.cat([eps, v], dim=1)


def streams(n: int, purpose: str = "test") -> list[torch.Generator]:
    return [stream(0, str(i), purpose) for i in range(n)]


@pytest.mark.parametrize("steps", [None, 12])
def test_restoration_of_a_gaussian_has_the_closed_form(steps: int | None) -> None:
    """x_0 given x_K, with x_K the noised y: mean and variance by the rules of joint Gaussians."""
    noise_step, y_value, n = 150, -0.9, 64
    y = torch.full((n, 3, 16, 16), y_value)
    times = visited_times(noise_step, steps)
    generators = streams(n)
    x_t = noise_to(y, SCHEDULE, noise_step, generators)
    x_0 = denoise(GaussianModel(times), x_t, SCHEDULE, times, generators, clip=False)

    abar = float(SCHEDULE.alphas_cumprod[noise_step - 1])
    total = SIGMA**2 * abar + 1 - abar
    gain = SIGMA**2 * math.sqrt(abar) / total
    mean = MU + gain * math.sqrt(abar) * (y_value - MU)
    variance = SIGMA**2 * (1 - abar) / total + gain**2 * (1 - abar)
    count = x_0.numel()
    assert float(x_0.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / count))
    # The last step gives the mean and no sample; what that leaves out is below 1e-4.
    assert float(x_0.var()) == pytest.approx(variance, abs=1e-4 + 4 * variance * math.sqrt(2 / count))


def test_unconditional_samples_have_the_data_distribution() -> None:
    times = visited_times(1000, 50)
    x_0 = sample(GaussianModel(times), (3, 16, 16), SCHEDULE, generators=streams(32), steps=50)
    count = x_0.numel()
    inside = torch.distributions.Normal(MU, SIGMA)  # clipping of the estimate matters beyond 2 sigma only
    assert float(x_0.mean()) == pytest.approx(MU, abs=0.02)
    assert float(x_0.median()) == pytest.approx(float(inside.icdf(torch.tensor(0.5))), abs=0.02)
    assert float(x_0.var()) == pytest.approx(SIGMA**2, rel=0.08)
    assert count == 32 * 3 * 16 * 16


def test_noising_uses_index_k_minus_1() -> None:
    y = torch.full((1, 3, 4, 4), 0.7)
    eps = randn(streams(1), (3, 4, 4), "cpu")
    for noise_step in (1, 2, 200, 1000):
        abar = float(SCHEDULE.alphas_cumprod[noise_step - 1])
        expected = math.sqrt(abar) * y + math.sqrt(1 - abar) * eps
        assert torch.allclose(noise_to(y, SCHEDULE, noise_step, streams(1)), expected, atol=1e-7)


def test_restoration_takes_k_steps_from_k_minus_1_to_0() -> None:
    seen: list[int] = []

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return torch.zeros_like(x_t)

    restore(model, torch.zeros(1, 3, 4, 4), SCHEDULE, noise_step=7, generators=streams(1))
    assert seen == [6, 5, 4, 3, 2, 1, 0]


def test_restoration_is_not_guided() -> None:
    """No gradient is asked for while restoring, so nothing can pull the result to the degraded picture."""

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        assert not x_t.requires_grad
        assert not torch.is_grad_enabled()
        return torch.zeros_like(x_t)

    restore(model, torch.zeros(1, 3, 4, 4), SCHEDULE, noise_step=40, generators=streams(1))


@pytest.mark.parametrize(("interval", "guided"), [(0, 0), (1, 60), (5, 12), (20, 3), (50, 1)])
def test_album_is_guided_once_every_interval(interval: int, guided: int) -> None:
    steps = {True: 0, False: 0}

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        steps[x_t.requires_grad] += 1
        return 0.1 * x_t

    generate_album(
        model,
        torch.zeros(3, 4, 4),
        SCHEDULE,
        noise_step=60,
        guidance_interval=interval,
        guidance_scale=0.3,
        generators=streams(2),
    )
    assert steps == {True: guided, False: 60 - guided}


def test_strides_keep_the_number_of_guided_steps() -> None:
    def guides(interval: int, steps: int | None) -> int:
        times = visited_times(600, steps)
        guidance = Guidance(torch.zeros(1), interval, 0.3)
        return sum(guidance.applies(t, s) for t, s in zip(times, [*times[1:], -1], strict=True))

    assert guides(20, None) == 30
    assert guides(20, 60) == 30
    assert guides(40, 30) == 15


def test_guidance_moves_by_the_gradient_of_the_distance() -> None:
    """For a linear estimate x0_pred = a x_t the gradient of the plain norm is a (x0_pred - y) / |x0_pred - y|."""
    y, x_t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4, requires_grad=True)
    a = 0.6
    gradient = Guidance(y, 1, 1.0).gradient(x_t, a * x_t)
    for i in range(2):
        difference = a * x_t[i].detach() - y[i]
        assert torch.allclose(gradient[i], a * difference / difference.norm(), atol=1e-6)


def test_pictures_of_an_album_do_not_guide_each_other(tiny_prior: Prior) -> None:
    arguments = {"noise_step": 30, "guidance_interval": 3, "guidance_scale": 1.0}
    y = torch.rand(3, 16, 16) * 2 - 1
    together = generate_album(tiny_prior.network, y, SCHEDULE, generators=streams(4), **arguments)
    alone = generate_album(tiny_prior.network, y, SCHEDULE, generators=streams(4)[2:3], **arguments)
    assert torch.allclose(together[2], alone[0], atol=1e-5)


def test_albums_of_several_faces_share_a_batch(tiny_prior: Prior) -> None:
    """Each picture is guided to its own face and draws its own noise."""
    arguments = {"noise_step": 30, "guidance_interval": 3, "guidance_scale": 1.0}
    ys = torch.rand(2, 3, 16, 16) * 2 - 1
    both = generate_album(
        tiny_prior.network, ys.repeat_interleave(3, 0), SCHEDULE, generators=streams(6), **arguments
    ).split(3)
    for i, y in enumerate(ys):
        alone = generate_album(tiny_prior.network, y, SCHEDULE, generators=streams(6)[3 * i : 3 * i + 3], **arguments)
        assert torch.allclose(both[i], alone, atol=1e-5)
    with pytest.raises(UserError, match="2 pictures, 3 generators"):
        generate_album(tiny_prior.network, ys, SCHEDULE, generators=streams(3), **arguments)


def test_guidance_draws_the_album_to_the_picture(tiny_prior: Prior) -> None:
    y = torch.rand(3, 16, 16) * 2 - 1

    def distance(scale: float) -> float:
        album = generate_album(
            tiny_prior.network,
            y,
            SCHEDULE,
            noise_step=300,
            steps=30,
            guidance_interval=10,
            guidance_scale=scale,
            generators=streams(4),
        )
        return float((album - y).square().mean())

    assert distance(2.0) < distance(0.5) < distance(0.0)


def test_batch_size_changes_no_restored_pixel(tiny_prior: Prior) -> None:
    y = torch.rand(5, 3, 16, 16) * 2 - 1
    together = restore(tiny_prior.network, y, SCHEDULE, noise_step=50, generators=streams(5))
    for i in range(5):
        alone = restore(tiny_prior.network, y[i : i + 1], SCHEDULE, noise_step=50, generators=streams(5)[i : i + 1])
        assert torch.allclose(together[i], alone[0], atol=1e-5)


def test_seed_unit_and_purpose_each_decide_the_noise() -> None:
    def draw(*key: object) -> Tensor:
        return torch.randn(100, generator=stream(*key))  # type: ignore[arg-type]

    base = draw(0, "unit", "restore")
    assert torch.equal(base, draw(0, "unit", "restore"))
    for other in ((1, "unit", "restore"), (0, "other", "restore"), (0, "unit", "album:0")):
        assert not torch.equal(base, draw(*other))


def test_wrong_calls_say_what_was_expected() -> None:
    with pytest.raises(UserError, match="2 pictures, 1 generators"):
        noise_to(torch.zeros(2, 3, 4, 4), SCHEDULE, 10, streams(1))
    with pytest.raises(UserError, match="T = 1000; got 1001"):
        noise_to(torch.zeros(1, 3, 4, 4), SCHEDULE, 1001, streams(1))
