"""Restoration by generation, and the generative album with skip guidance.

| paper                                   | here                                  |
|-----------------------------------------|---------------------------------------|
| degraded picture y_0, its noised y_K    | `y`, the first `x_t`                  |
| noise step K                            | `noise_step` (index t = K - 1)        |
| guide every n steps, weight lambda      | `guidance_interval`, `guidance_scale` |
| estimate of the clean picture x0_hat    | `x0_pred`                             |

A model is any callable ``model(x_t, t)``; randomness comes from one generator a picture, so that the pictures which
share a batch do not change each other.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from rgcp_core.errors import UserError
from rgcp_core.loss import Model
from rgcp_core.randomness import randn
from rgcp_core.schedule import Schedule, check_noise_step, learned_log_variance, visited_times

Progress = Callable[[int, int], None]
"""Called after every denoising step with (steps done, steps in all)."""

GuidanceDistance = Literal["l2", "l2_squared", "l1"]


class Guidance(NamedTuple):
    """Pulls x_t towards pictures whose clean estimate resembles ``y``, once every ``interval`` diffusion steps."""

    y: Tensor
    """(N,3,H,W) degraded pictures in [-1,1]."""
    interval: int
    """n of the paper; 1 guides every step, 0 never."""
    scale: float
    """lambda of the paper."""
    distance: GuidanceDistance = "l2"
    """``l2`` as the released code, ``l2_squared`` as Eq. 6, ``l1`` as the paper's text."""

    def applies(self, t: int, s: int) -> bool:
        """Whether the step from ``t`` to ``s`` crosses a multiple of the interval; strides keep the count of guides."""
        return self.interval > 0 and (t + 1) // self.interval > (s + 1) // self.interval

    def gradient(self, x_t: Tensor, x0_pred: Tensor) -> Tensor:
        """grad_{x_t} of the distance between ``y`` and ``x0_pred(x_t)``, independent for each picture of the batch."""
        difference = (self.y - x0_pred).flatten(1)
        if self.distance == "l1":
            distance = difference.abs().sum(1)
        else:
            distance = difference.square().sum(1)
            if self.distance == "l2":
                distance = distance.sqrt()
        return torch.autograd.grad(distance.sum(), x_t)[0]


class Step(NamedTuple):
    """One reverse step: what the model believes, and the state it leads to."""

    x_s: Tensor
    x0_pred: Tensor


def restore(
    model: Model,
    y: Tensor,
    schedule: Schedule,
    *,
    noise_step: int,
    generators: Sequence[Generator],
    steps: int | None = None,
    on_step: Progress | None = None,
) -> Tensor:
    """Noise ``y`` to step K and denoise it with ``model``, without guidance (paper, section 3).

    Args:
        model: the constrained prior's network (or any noise predictor).
        y: (N,3,H,W) degraded pictures in [-1,1].
        schedule: the prior's.
        noise_step: K, 1..T. Small: faithful and still degraded. Large: clean and less faithful.
        generators: one a picture.
        steps: visit only so many of the K times, evenly spaced; None visits all.
        on_step: progress callback.

    Returns:
        (N,3,H,W) restored pictures in [-1,1].
    """
    x_t = noise_to(y, schedule, noise_step, generators)
    return denoise(model, x_t, schedule, visited_times(noise_step, steps), generators, on_step=on_step)


def generate_album(
    model: Model,
    y: Tensor,
    schedule: Schedule,
    *,
    noise_step: int,
    guidance_interval: int,
    guidance_scale: float,
    generators: Sequence[Generator],
    guidance_distance: GuidanceDistance = "l2",
    steps: int | None = None,
    on_step: Progress | None = None,
) -> Tensor:
    """Draw anchors near ``y`` from the unmodified prior with skip guidance (paper, section 3.3).

    Args:
        model: the unmodified prior's network.
        y: (3,H,W) the degraded picture in [-1,1]; or (N,3,H,W), the one that each album picture belongs to: albums of
            several faces in one batch.
        schedule: the prior's.
        noise_step: K of the album (600 at 256 px).
        guidance_interval: n, guide once every n diffusion steps; 0 never. Guiding every step drags the samples down
            to the degraded picture, never guiding loses the subject (supplement, Fig. 9).
        guidance_scale: lambda.
        generators: one an album picture; their count is the album's size.
        guidance_distance: see `Guidance`.
        steps: visit only so many times, evenly spaced; None visits all. The count of guides stays.
        on_step: progress callback.

    Returns:
        (N,3,H,W) the album in [-1,1].
    """
    ys = y if y.ndim == 4 else y.expand(len(generators), *y.shape)
    guidance = Guidance(ys, guidance_interval, guidance_scale, guidance_distance)
    x_t = noise_to(ys, schedule, noise_step, generators)
    times = visited_times(noise_step, steps)
    return denoise(model, x_t, schedule, times, generators, guidance=guidance, on_step=on_step)


def sample(
    model: Model,
    shape: tuple[int, int, int],
    schedule: Schedule,
    *,
    generators: Sequence[Generator],
    device: torch.device | str = "cpu",
    steps: int | None = None,
    on_step: Progress | None = None,
) -> Tensor:
    """Unconditional samples (N,*shape) in [-1,1], from pure noise; N is the number of generators."""
    x_t = randn(generators, shape, device)
    times = visited_times(schedule.steps, steps)
    return denoise(model, x_t, schedule, times, generators, on_step=on_step)


def noise_to(y: Tensor, schedule: Schedule, noise_step: int, generators: Sequence[Generator]) -> Tensor:
    """y_K of the paper: ``y`` (N,3,H,W) noised to index t = K - 1."""
    check_noise_step(noise_step, schedule)
    if len(generators) != len(y):
        raise UserError(f"One generator a picture is needed: {len(y)} pictures, {len(generators)} generators.")
    t = torch.full((len(y),), noise_step - 1, device=y.device)
    return schedule.q_sample(y, t, randn(generators, tuple(y.shape[1:]), y.device))


def denoise(
    model: Model,
    x_t: Tensor,
    schedule: Schedule,
    times: Sequence[int],
    generators: Sequence[Generator],
    *,
    guidance: Guidance | None = None,
    clip: bool = True,
    on_step: Progress | None = None,
) -> Tensor:
    """Ancestral sampling from ``x_t`` at ``times[0]`` down to the clean picture.

    Args:
        model: noise predictor.
        x_t: (N,3,H,W) state at ``times[0]``.
        schedule: the prior's.
        times: descending; the step after the last leads to the clean picture.
        generators: one a picture.
        guidance: skip guidance, or None.
        clip: keep the estimate of the clean picture within [-1,1], as guided-diffusion does.
        on_step: progress callback.
    """
    for i, (t, s) in enumerate(zip(times, [*times[1:], -1], strict=True)):
        if guidance is not None and guidance.applies(t, s):
            with torch.enable_grad():
                x_t = x_t.detach().requires_grad_()
                step = denoise_step(model, x_t, schedule, t, s, generators, clip=clip)
                gradient = guidance.gradient(x_t, step.x0_pred)
            # The gradient is taken at x_t and moves the state that the step arrives at, as in the released code.
            x_t = step.x_s.detach() - guidance.scale * gradient
        else:
            with torch.no_grad():
                x_t = denoise_step(model, x_t, schedule, t, s, generators, clip=clip).x_s
        if on_step is not None:
            on_step(i + 1, len(times))
    return x_t


def denoise_step(
    model: Model,
    x_t: Tensor,
    schedule: Schedule,
    t: int,
    s: int,
    generators: Sequence[Generator],
    *,
    clip: bool = True,
) -> Step:
    """Draw x_s from p(x_s | x_t) for s < t (Ho et al. 2020, Algorithm 2; learned variance if the model gives one)."""
    t_batch = torch.full((len(x_t),), t, device=x_t.device)
    s_batch = torch.full_like(t_batch, s)
    output = model(x_t, t_batch)
    channels = x_t.shape[1]
    x0_pred = schedule.predict_x0(x_t, t_batch, output[:, :channels])
    if clip:
        x0_pred = x0_pred.clamp(-1, 1)
    posterior = schedule.posterior(x0_pred, x_t, t_batch, s_batch)
    if s < 0:
        return Step(posterior.mean, x0_pred)
    log_variance = posterior.log_variance
    if output.shape[1] > channels:
        upper = schedule.log_beta(t_batch, s_batch, x_t)
        log_variance = learned_log_variance(output[:, channels:], log_variance, upper)
    noise = randn(generators, tuple(x_t.shape[1:]), x_t.device)
    return Step(posterior.mean + (0.5 * log_variance).exp() * noise, x0_pred)
