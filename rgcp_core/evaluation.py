"""How good a prior is: its denoising error on held-out pictures, by noise level, with fixed noise."""

import torch

from rgcp_core.loss import Model
from rgcp_core.randomness import stream
from rgcp_core.schedule import Schedule
from rgcp_core.training_data import Pictures

TIMES = (50, 100, 200, 400, 600, 800)
"""Times at which priors are compared."""


@torch.no_grad()
def heldout_errors(
    model: Model,
    pictures: Pictures,
    schedule: Schedule,
    *,
    device: torch.device | str = "cpu",
    times: tuple[int, ...] = TIMES,
    batch_size: int = 32,
) -> dict[int, float]:
    """Mean squared error of the predicted noise, E||eps - eps_theta(x_t, t)||^2 a pixel, by time.

    Picture and time decide the noise, so that two priors are given the same noisy pictures.
    """
    errors: dict[int, float] = {}
    for t in times:
        noise = stream(0, f"t{t}", "heldout")
        total = 0.0
        for x_0 in pictures.batches(batch_size):
            eps = torch.randn(x_0.shape, generator=noise).to(device)
            ts = torch.full((len(x_0),), t, device=device)
            eps_pred = model(schedule.q_sample(x_0.to(device), ts, eps), ts)[:, :3].float()
            total += float((eps_pred - eps).square().flatten(1).mean(1).sum())
        errors[t] = total / len(pictures)
    return errors
