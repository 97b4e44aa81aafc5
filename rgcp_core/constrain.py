"""Constraining a prior: fine-tuning it on anchor images near the unknown clean picture (paper, section 3.2)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from rgcp_core.errors import UserError
from rgcp_core.loss import denoising_loss
from rgcp_core.precision import Precision, at_precision
from rgcp_core.prior import Prior
from rgcp_core.randomness import randn, send, stream
from rgcp_core.unet import Norm, ResBlock, UNet

Progress = Callable[[int, int], None]
LearningRateDecay = Literal["none", "linear"]
Parameters = Literal["all", "norms", "low_rank"]
RANK = 4
"""Channels through which a ``low_rank`` change of a convolution has to pass."""
CHECK_EVERY = 25
"""Steps between two looks at the held-out loss: one look costs about as much as a step."""


@dataclass(frozen=True)
class Constrained:
    """A constrained prior and how the fitting went."""

    prior: Prior
    losses: Tensor
    """Noise error of each step that was taken, on the CPU; it jumps with the times that the step drew."""
    loss_start: float
    """Noise error of the unmodified prior on the anchors, at fixed times and noise."""
    loss_end: float
    """The same of the constrained one: what the fine-tuning has achieved."""


def constrain_prior(
    prior: Prior,
    anchors: Tensor,
    *,
    iterations: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    unit: str,
    t_end: int | None = None,
    learning_rate_decay: LearningRateDecay = "none",
    precision: Precision = "float32",
    parameters: Parameters = "all",
    patience: int | None = None,
    on_step: Progress | None = None,
) -> Constrained:
    """Fine-tune a copy of ``prior`` on ``anchors`` with the diffusion loss; the prior itself is not changed.

    Adam without weight decay, no flips, the raw weights and not an average of them (Table 1, released code).

    Args:
        prior: the unmodified prior.
        anchors: (N,3,H,W) in [-1,1]: a generative or a personal album.
        iterations: optimiser steps (3000 at 256 px; 5000 personal); 0 returns the prior as it is.
        batch_size: anchors a step, drawn with replacement (4).
        learning_rate: of Adam (1e-5).
        seed: seed of the run.
        unit: whose album this is; with the seed it decides every draw.
        t_end: draw times uniformly from 0..t_end-1. None: all T, as the paper does. A restoration from step K never
            visits t >= K.
        learning_rate_decay: ``linear`` to zero as the released code, ``none`` as the paper's table.
        precision: what the network computes in; its weights and Adam's moments are float32 either way.
        parameters: which weights move: ``all`` (paper), ``norms`` (scales and shifts only, with the time's part in
            them), or ``low_rank`` (3 x 3 convolutions by a product of two thin ones, `RANK` channels wide). The
            weights of the result have the prior's shapes either way.
        patience: hold a quarter of the anchors out and stop when their loss has not fallen for so many steps; the
            weights of the lowest one are returned. None: all anchors are trained on, for all iterations.
        on_step: progress callback.

    Raises:
        UserError: no anchors, anchors of another size than the prior's, too few to hold any out, or a loss that is
            not finite.
    """
    size = prior.card.image_size
    if anchors.ndim != 4 or len(anchors) == 0 or tuple(anchors.shape[1:]) != (3, size, size):
        raise UserError(f"Anchors must be (N,3,{size},{size}) with N > 0; got {tuple(anchors.shape)}.")
    t_end = prior.schedule.steps if t_end is None else t_end
    device = next(prior.network.parameters()).device
    anchors = anchors.to(device)
    loss_start = album_loss(prior, anchors, t_end)
    if iterations == 0:
        return Constrained(prior, torch.empty(0), loss_start, loss_start)
    held_out = anchors[:0]
    if patience is not None:
        if len(anchors) < 2:
            raise UserError("Early stopping holds anchors out: it needs at least 2, or `patience` must be none.")
        count = max(1, len(anchors) // 4)
        anchors, held_out = anchors[:-count], anchors[-count:]
    # Layout by device: on a CPU channels-last makes inference faster and training slower (docs/performance.md).
    network = copy.deepcopy(prior.network)
    if device.type == "cpu":
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    trained = _prepare(network.train(), parameters, stream(seed, unit, "low rank"))
    model = at_precision(network, precision)
    optimizer = torch.optim.Adam(trained, lr=learning_rate, fused=True)
    draws = stream(seed, unit, "constrain")
    losses = torch.empty(iterations, device=device)
    best = _Best(patience)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(stream(seed, unit, "dropout").initial_seed())
        for i in range(iterations):
            if learning_rate_decay == "linear":
                optimizer.param_groups[0]["lr"] = learning_rate * (1 - i / iterations)
            rows = send(torch.randint(len(anchors), (batch_size,), generator=draws), device)
            t = send(torch.randint(t_end, (batch_size,), generator=draws), device)
            eps = send(torch.randn((batch_size, *anchors.shape[1:]), generator=draws), device)
            loss = denoising_loss(model, anchors[rows], t, eps, prior.schedule)
            loss.total.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[i] = loss.mse.detach().mean()
            if on_step is not None:
                on_step(i + 1, iterations)
            if patience is not None and (i + 1) % CHECK_EVERY == 0:
                network.eval()
                best.look(
                    i + 1, album_loss(replace(prior, network=network), held_out.repeat(4, 1, 1, 1), t_end), trained
                )
                network.train()
                if best.stops(i + 1):
                    losses = losses[: i + 1]
                    break
    best.restore(trained)

    losses = losses.cpu()
    if not bool(losses.isfinite().all()):
        raise UserError(
            f"Fine-tuning diverged: the loss is not finite from step {int((~losses.isfinite()).nonzero()[0])} on. "
            f"Lower the learning rate (now {learning_rate:g})."
        )
    _merge_low_rank(network)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    constrained = replace(prior, network=network.eval().requires_grad_(False))
    return Constrained(constrained, losses, loss_start, album_loss(constrained, torch.cat([anchors, held_out]), t_end))


@dataclass
class _Best:
    """The weights with the lowest held-out loss so far."""

    patience: int | None
    loss: float = float("inf")
    step: int = 0
    weights: list[Tensor] | None = None

    def look(self, step: int, loss: float, trained: list[nn.Parameter]) -> None:
        if loss < self.loss:
            self.loss, self.step = loss, step
            self.weights = [parameter.detach().clone() for parameter in trained]

    def stops(self, step: int) -> bool:
        return self.patience is not None and step - self.step >= self.patience

    @torch.no_grad()
    def restore(self, trained: list[nn.Parameter]) -> None:
        for parameter, weight in zip(trained, self.weights or trained, strict=True):
            parameter.copy_(weight)


class _LowRank(nn.Module):
    """A frozen convolution plus a trained one of few channels; ``up`` starts at zero, so that nothing changes."""

    def __init__(self, conv: nn.Conv2d, draws: torch.Generator) -> None:
        super().__init__()
        self.conv = conv
        shape = (RANK, *conv.weight.shape[1:])
        down = torch.randn(shape, generator=draws) / conv.weight[0].numel() ** 0.5
        self.down = nn.Parameter(down.to(conv.weight.device))
        self.up = nn.Parameter(torch.zeros(conv.out_channels, RANK, 1, 1, device=conv.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        thin = nn.functional.conv2d(x, self.down, None, self.conv.stride, self.conv.padding)
        return self.conv(x) + nn.functional.conv2d(thin, self.up)

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        self.conv.weight += torch.einsum("or,rihw->oihw", self.up[:, :, 0, 0], self.down)
        return self.conv


def _prepare(network: UNet, parameters: Parameters, draws: torch.Generator) -> list[nn.Parameter]:
    """Freeze what is not trained and return what is; under ``low_rank`` thin convolutions are put beside the others.

    Where no weight of a convolution is trained, its gradient is not computed: a third of a step's arithmetic.
    """
    if parameters == "all":
        return list(network.requires_grad_(True).parameters())
    network.requires_grad_(False)
    if parameters == "norms":
        for module in network.modules():
            if isinstance(module, Norm):
                module.requires_grad_(True)
            elif isinstance(module, ResBlock):
                module.emb_layers.requires_grad_(True)
    else:
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3):
                    setattr(parent, name, _LowRank(child, draws))
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _merge_low_rank(network: UNet) -> None:
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _LowRank):
                setattr(parent, name, child.merged())


@torch.no_grad()
def album_loss(prior: Prior, anchors: Tensor, t_end: int) -> float:
    """Noise error on the anchors (N,3,H,W), each at one of N times spread evenly over 0..t_end-1, with fixed noise."""
    fractions = (torch.arange(len(anchors), device=anchors.device) + 0.5) / len(anchors)
    noise = randn([stream(0, str(i), "album loss") for i in range(len(anchors))], anchors.shape[1:], anchors.device)
    t = (fractions * t_end).long()
    return float(denoising_loss(prior.network, anchors, t, noise, prior.schedule).mse.mean())
