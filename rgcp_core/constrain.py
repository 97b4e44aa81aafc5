"""Constraining a prior: fine-tuning it on anchor images near the unknown clean picture (paper, section 3.2)."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from rgcp_core.compute import Precision, computing
from rgcp_core.errors import UserError
from rgcp_core.loss import Model, denoising_loss
from rgcp_core.prior import Prior
from rgcp_core.randomness import randn, send, stream
from rgcp_core.sampling import restore
from rgcp_core.schedule import Schedule
from rgcp_core.unet import Norm, ResBlock, UNet

Progress = Callable[[int, int], None]
LearningRateDecay = Literal["none", "linear"]
Parameters = Literal["all", "norms", "low_rank"]
RANK = 4
"""Channels through which a ``low_rank`` change of a convolution has to pass."""
CHECK_EVERY = 25
"""Steps between two looks at the held-out loss or the draft: one look costs about as much as a step."""
DRAFT_STEPS = 10
"""Denoising steps of a draft."""
Draft = Callable[[Model], Tensor]
"""A restoration made quickly with a model, (1,3,H,W) in [-1,1]: see `draft_of`."""


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
    compiled: bool = False,
    into: UNet | None = None,
    parameters: Parameters = "all",
    patience: int | None = None,
    settled: float | None = None,
    draft: Draft | None = None,
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
        compiled: see `computing`.
        into: a network of the prior's architecture, whose weights are overwritten and which the result then is: valid
            until the next face. On CUDA the graphs of compiled code belong to its weights' addresses and serve face
            after face. None, and always under ``low_rank``, which puts other layers in: a new copy.
        parameters: which weights move: ``all`` (paper), ``norms`` (scales and shifts only, with the time's part in
            them), or ``low_rank`` (3 x 3 convolutions by a product of two thin ones, `RANK` channels wide). The
            weights of the result have the prior's shapes either way.
        patience: hold a quarter of the anchors out and stop when their loss has not fallen for so many steps; the
            weights of the lowest one are returned. None: all anchors are trained on, for all iterations.
        settled: stop when ``draft`` has moved by less than so many of 255 levels (mean absolute difference) since the
            last look, `CHECK_EVERY` steps before. None: never.
        draft: what ``settled`` looks at.
        on_step: progress callback.

    Raises:
        UserError: no anchors, anchors of another size than the prior's, too few to hold any out, nothing to look at,
            the prior's own network to write into, or a loss that is not finite.
    """
    _check_anchors(prior, anchors)
    if settled is not None and draft is None:
        raise UserError("`settled` looks at the face that is restored, and here is none: it must be none.")
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
    network = _fresh(prior, None if parameters == "low_rank" else into)
    trained = _prepare(network, parameters, stream(seed, unit, "low rank"))
    optimizer = torch.optim.Adam(trained, lr=learning_rate, fused=True)
    draws = stream(seed, unit, "constrain")
    losses = torch.empty(iterations, device=device)
    best, picture = _Best(patience), _Picture(settled, draft)

    cuda = [device] if device.type == "cuda" else []
    with computing(network, precision, compiled) as model, torch.random.fork_rng(devices=cuda):
        torch.manual_seed(stream(seed, unit, "dropout").initial_seed())
        for i in range(iterations):
            if learning_rate_decay == "linear":
                optimizer.param_groups[0]["lr"] = learning_rate * (1 - i / iterations)
            x_0, t, eps = _draw(anchors, batch_size, t_end, draws)
            loss = denoising_loss(model, x_0, t, eps, prior.schedule)
            loss.total.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[i] = loss.mse.detach().mean()
            if on_step is not None:
                on_step(i + 1, iterations)
            if (i + 1) % CHECK_EVERY == 0 and (patience is not None or settled is not None):
                network.eval()
                if patience is not None:
                    held_out_loss = album_loss(replace(prior, network=network), held_out.repeat(4, 1, 1, 1), t_end)
                    best.look(i + 1, held_out_loss, trained)
                stops = picture.has_settled(model) or best.stops(i + 1)
                network.train()
                if stops:
                    losses = losses[: i + 1]
                    break
    best.restore(trained)
    _check_losses(losses, learning_rate)
    _merge_low_rank(network)
    constrained = _finished(prior, network)
    return Constrained(
        constrained, losses.cpu(), loss_start, album_loss(constrained, torch.cat([anchors, held_out]), t_end)
    )


def constrain_together(
    prior: Prior,
    albums: Sequence[Tensor],
    *,
    iterations: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    units: Sequence[str],
    t_ends: Sequence[int | None],
    parameters: Parameters,
    learning_rate_decay: LearningRateDecay = "none",
    precision: Precision = "float32",
    on_step: Progress | None = None,
) -> list[Constrained]:
    """Fine-tune on several albums in one batch: as `constrain_prior` for each, to the order of sums, and faster.

    Where only norms or thin convolutions move, the large convolutions are the same for all faces and take their
    pictures in one call; each face has its own copy of what moves, its own draws and its own Adam.

    Args:
        prior: the unmodified prior, without dropout, whose draws the faces would share.
        albums: (N_i,3,H,W) in [-1,1] each.
        iterations: see `constrain_prior`, as all that is not named here.
        batch_size: anchors a step of each face.
        learning_rate: of Adam.
        seed: seed of the run.
        units: whose album each is.
        t_ends: times below this are trained, by face.
        parameters: ``norms`` or ``low_rank``.
        learning_rate_decay: ``linear`` or ``none``.
        precision: what the network computes in.
        on_step: progress callback.

    Raises:
        UserError: ``parameters`` or a prior that cannot be shared, wrong albums, or a loss that is not finite.
    """
    if not can_share(prior, parameters):
        raise UserError(
            "Faces can share a step where the prior has no dropout and `parameters` is norms or low_rank; got dropout "
            f"{prior.card.architecture.dropout:g} and {parameters}."
        )
    if not len(albums) == len(units) == len(t_ends):
        raise UserError(f"Expected one of each a face; got {len(albums)}, {len(units)} and {len(t_ends)}.")
    for album in albums:
        _check_anchors(prior, album)
    device = next(prior.network.parameters()).device
    albums = [album.to(device) for album in albums]
    ends = [prior.schedule.steps if t_end is None else t_end for t_end in t_ends]
    starts = [album_loss(prior, album, t_end) for album, t_end in zip(albums, ends, strict=True)]
    if iterations == 0:
        return [Constrained(prior, torch.empty(0), start, start) for start in starts]

    networks = []
    for unit in units:
        network = _fresh(prior)
        _prepare(network, parameters, stream(seed, unit, "low rank"))
        networks.append(network)
    shared = networks[0]
    names = [name for name, parameter in shared.named_parameters() if parameter.requires_grad]
    own = {
        name: torch.stack([network.get_parameter(name).detach() for network in networks]).requires_grad_()
        for name in names
    }
    of_each = torch.vmap(lambda weights, x_t, t: functional_call(shared, weights, (x_t, t)))
    faces = (len(albums), batch_size)

    def together(x_t: Tensor, t: Tensor) -> Tensor:
        return of_each(own, x_t.unflatten(0, faces), t.unflatten(0, faces)).flatten(0, 1)

    optimizer = torch.optim.Adam(own.values(), lr=learning_rate, fused=True)
    draws = [stream(seed, unit, "constrain") for unit in units]
    losses = torch.empty(iterations, len(albums), device=device)
    with computing(together, precision) as model:
        for i in range(iterations):
            if learning_rate_decay == "linear":
                optimizer.param_groups[0]["lr"] = learning_rate * (1 - i / iterations)
            drawn = [
                _draw(album, batch_size, t_end, generator)
                for album, t_end, generator in zip(albums, ends, draws, strict=True)
            ]
            x_0, t, eps = (torch.cat(parts) for parts in zip(*drawn, strict=True))
            loss = denoising_loss(model, x_0, t, eps, prior.schedule)
            loss.total.unflatten(0, faces).mean(1).sum().backward()  # a face's weights see its own pictures only
            optimizer.step()
            optimizer.zero_grad()
            losses[i] = loss.mse.detach().unflatten(0, faces).mean(1)
            if on_step is not None:
                on_step(i + 1, iterations)

    results = []
    for i, (network, album, t_end, start) in enumerate(zip(networks, albums, ends, starts, strict=True)):
        _check_losses(losses[:, i], learning_rate)
        with torch.no_grad():
            for name in names:
                network.get_parameter(name).copy_(own[name][i])
        _merge_low_rank(network)
        constrained = _finished(prior, network)
        results.append(Constrained(constrained, losses[:, i].cpu(), start, album_loss(constrained, album, t_end)))
    return results


def can_share(prior: Prior, parameters: Parameters) -> bool:
    """Whether the fine-tunings of several faces can share a step: see `constrain_together`."""
    return parameters != "all" and prior.card.architecture.dropout == 0


def draft_of(y: Tensor, schedule: Schedule, noise_step: int, seed: int, unit: str) -> Draft:
    """What `constrain_prior` looks at: ``y`` (3,H,W), restored from K in few steps and always with the same noise.

    Two drafts differ by what the model has learned in between and by nothing else.
    """

    def draft(model: Model) -> Tensor:
        generators = [stream(seed, unit, "draft")]
        return restore(model, y[None], schedule, noise_step=noise_step, generators=generators, steps=DRAFT_STEPS)

    return draft


def _draw(anchors: Tensor, batch_size: int, t_end: int, draws: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x_0, t and eps of one step: (B,3,H,W), (B,), (B,3,H,W)."""
    rows = send(torch.randint(len(anchors), (batch_size,), generator=draws), anchors.device)
    t = send(torch.randint(t_end, (batch_size,), generator=draws), anchors.device)
    eps = send(torch.randn((batch_size, *anchors.shape[1:]), generator=draws), anchors.device)
    return anchors[rows], t, eps


def _check_anchors(prior: Prior, anchors: Tensor) -> None:
    size = prior.card.image_size
    if anchors.ndim != 4 or len(anchors) == 0 or tuple(anchors.shape[1:]) != (3, size, size):
        raise UserError(f"Anchors must be (N,3,{size},{size}) with N > 0; got {tuple(anchors.shape)}.")


def _check_losses(losses: Tensor, learning_rate: float) -> None:
    losses = losses.cpu()
    if not bool(losses.isfinite().all()):
        raise UserError(
            f"Fine-tuning diverged: the loss is not finite from step {int((~losses.isfinite()).nonzero()[0])} on. "
            f"Lower the learning rate (now {learning_rate:g})."
        )


def _fresh(prior: Prior, into: UNet | None = None) -> UNet:
    """A network with the prior's weights, a copy or ``into``, to be trained.

    It is laid out for that: channels-last is slower there on a CPU.
    """
    if into is None:
        network = copy.deepcopy(prior.network)
    else:
        network = into
        if next(network.parameters()).data_ptr() == next(prior.network.parameters()).data_ptr():
            raise UserError("`into` shares its weights with the prior: the prior itself would be fine-tuned. Copy it.")
        network.load_state_dict(prior.network.state_dict())  # in place
    network.train()
    if next(network.parameters()).device.type == "cpu":
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return network


def _finished(prior: Prior, network: UNet) -> Prior:
    """The prior with its fine-tuned network, frozen and laid out for inference."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return replace(prior, network=network.eval().requires_grad_(False))


@dataclass
class _Picture:
    """The draft of the last look."""

    settled: float | None
    draft: Draft | None
    last: Tensor | None = None

    def has_settled(self, model: Model) -> bool:
        """Make a new draft; whether it is nearly the last one."""
        if self.settled is None or self.draft is None:
            return False
        before, self.last = self.last, self.draft(model)
        return before is not None and float((self.last - before).abs().mean()) * 127.5 < self.settled


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
