"""The method done plainly, as the thing that our code is timed and checked against.

Eager float32, no batching over the album, an unfused optimiser, an average of the weights that nobody reads, norms and
losses read out at every step: what the published code does, in our own words and with none of our code. Attention is
written out; gradient checkpointing is off, as it is there. The weights are a state dict with guided-diffusion's keys.

Randomness comes from the caller's generators, drawn in the order in which `rgcp_core` draws, so that both can be given
one tape of noise, times and dropout.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from rgcp_core.unet import UNetConfig

Weights = dict[str, Tensor]
Progress = Callable[[int, int], None]
EMA_RATE = 0.9999


# ------------------------------------------------------------------------------------------------------ the network


class Network:
    """The ADM U-Net as a function of its weights; scale-shift norms and the old order of heads only."""

    def __init__(self, weights: Weights, config: UNetConfig) -> None:
        if not config.use_scale_shift_norm or config.use_new_attention_order:
            raise ValueError("The reference knows scale-shift norms and guided-diffusion's old order of heads only.")
        self.weights = {name: value.detach().clone().contiguous() for name, value in weights.items()}
        self.config = config
        self.training = False

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """(N,3,H,W) and (N,) to (N,6,H,W)."""
        config, size, index = self.config, self.config.image_size, 1
        half = config.model_channels // 2
        steps = torch.arange(half, device=x.device) / (half - config.frequency_shift)
        angles = t[:, None].float() * torch.exp(-math.log(10_000) * steps)
        emb = self._linear(torch.cat([angles.cos(), angles.sin()], 1), "time_embed.0")
        emb = self._linear(F.silu(emb), "time_embed.2")

        h = self._conv(x, "input_blocks.0.0")
        skips = [h]
        levels = len(config.channel_mult)
        for level in range(levels):
            for _ in range(config.num_res_blocks):
                h = self._level(h, emb, f"input_blocks.{index}", size)
                skips.append(h)
                index += 1
            if level < levels - 1:
                name = f"input_blocks.{index}.0"
                if config.resblock_updown:
                    h = self._residual(h, emb, name, lambda z: F.avg_pool2d(z, 2))
                elif config.downsample_padding == "end":
                    h = self._conv(F.pad(h, (0, 1, 0, 1)), f"{name}.op", stride=2, padding=0)
                else:
                    h = self._conv(h, f"{name}.op", stride=2)
                skips.append(h)
                index, size = index + 1, size // 2
        h = self._residual(h, emb, "middle_block.0")
        h = self._residual(self._attention(h, "middle_block.1"), emb, "middle_block.2")
        index = 0
        for level in reversed(range(levels)):
            for i in range(config.num_res_blocks + 1):
                name = f"output_blocks.{index}"
                h = self._level(torch.cat([h, skips.pop()], 1), emb, name, size)
                if level and i == config.num_res_blocks:
                    name += ".2" if size in config.attention_resolutions else ".1"
                    if config.resblock_updown:
                        h = self._residual(h, emb, name, lambda z: F.interpolate(z, scale_factor=2.0))
                    else:
                        h = self._conv(F.interpolate(h, scale_factor=2.0), f"{name}.conv")
                    size *= 2
                index += 1
        return self._conv(F.silu(self._norm(h, "out.0")), "out.2")

    def _level(self, h: Tensor, emb: Tensor, name: str, size: int) -> Tensor:
        h = self._residual(h, emb, f"{name}.0")
        return self._attention(h, f"{name}.1") if size in self.config.attention_resolutions else h

    def _residual(
        self, x: Tensor, emb: Tensor, name: str, resample: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        h = F.silu(self._norm(x, f"{name}.in_layers.0"))
        if resample is not None:
            h, x = resample(h), resample(x)
        h = self._conv(h, f"{name}.in_layers.2")
        scale, shift = self._linear(F.silu(emb), f"{name}.emb_layers.1")[..., None, None].chunk(2, dim=1)
        h = F.silu(self._norm(h, f"{name}.out_layers.0") * (1 + scale) + shift)
        h = F.dropout(h, self.config.dropout, self.training)
        if f"{name}.skip_connection.weight" in self.weights:
            x = self._conv(x, f"{name}.skip_connection")
        return x + self._conv(h, f"{name}.out_layers.3")

    def _attention(self, x: Tensor, name: str) -> Tensor:
        n, c, height, width = x.shape
        head = self.config.num_head_channels
        flat = x.reshape(n, c, -1)
        qkv = self._conv1d(self._norm(flat, f"{name}.norm"), f"{name}.qkv")
        q, k, v = qkv.reshape(n * (c // head), 3 * head, -1).split(head, dim=1)
        scale = head**-0.25
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(dim=-1)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(n, c, -1)
        return (flat + self._conv1d(h, f"{name}.proj_out")).reshape(n, c, height, width)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 32, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self.config.norm_eps)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _conv(self, x: Tensor, name: str, *, stride: int = 1, padding: int | None = None) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        padding = weight.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, weight, self.weights[f"{name}.bias"], stride=stride, padding=padding)

    def _conv1d(self, x: Tensor, name: str) -> Tensor:
        return F.conv1d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])


# ---------------------------------------------------------------------------------------------------- the diffusion


class Diffusion:
    """DDPM's constants as float64 tables on the CPU; each is taken to the device whenever it is looked up."""

    def __init__(self, betas: Tensor) -> None:
        betas = betas.double()
        self.abar = torch.cumprod(1 - betas, 0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.abar[:-1]])
        self.sqrt_abar, self.sqrt_rest = self.abar.sqrt(), (1 - self.abar).sqrt()
        self.mean_x0 = betas * before.sqrt() / (1 - self.abar)
        self.mean_xt = (1 - betas).sqrt() * (1 - before) / (1 - self.abar)
        variance = betas * (1 - before) / (1 - self.abar)
        self.log_lower = torch.cat([variance[1:2], variance[1:]]).log()  # that of t = 0 is zero: t = 1 stands in
        self.log_upper = betas.log()

    def at(self, table: Tensor, t: Tensor) -> Tensor:
        """Values (N,1,1,1) of a table at times ``t`` (N,)."""
        return table.to(t.device)[t].float().view(-1, 1, 1, 1)

    def noised(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """q(x_t | x_0)."""
        return self.at(self.sqrt_abar, t) * x_0 + self.at(self.sqrt_rest, t) * eps

    def clean(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_0 that ``x_t`` and ``eps`` imply."""
        return (x_t - self.at(self.sqrt_rest, t) * eps) / self.at(self.sqrt_abar, t)

    def mean(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0)."""
        return self.at(self.mean_x0, t) * x_0 + self.at(self.mean_xt, t) * x_t

    def log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        """The learned one, between its bounds."""
        fraction = (v + 1) / 2
        return fraction * self.at(self.log_upper, t) + (1 - fraction) * self.at(self.log_lower, t)


def loss_of(network: Network, diffusion: Diffusion, x_0: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """(mse + bound, mse), each (N,): L_simple, and the variational bound that moves the learned variance only."""
    x_t = diffusion.noised(x_0, t, eps)
    output = network(x_t, t)
    mse = (eps - output[:, :3]).square().mean((1, 2, 3))
    mean = diffusion.mean(diffusion.clean(x_t, t, output[:, :3].detach()), x_t, t)
    log_variance, lower = diffusion.log_variance(output[:, 3:], t), diffusion.at(diffusion.log_lower, t)
    distance = (diffusion.mean(x_0, x_t, t) - mean).square()
    kl = 0.5 * (log_variance - lower + (lower - log_variance).exp() + distance * (-log_variance).exp() - 1)
    # At t = 0: minus the log of the probability of the 8-bit level, open-ended at black and white.
    deviation = (0.5 * log_variance).exp() * math.sqrt(2)
    above = torch.where(x_0 > 0.999, 1.0, 0.5 * (1 + torch.erf((x_0 - mean + 1 / 255) / deviation)))
    below = torch.where(x_0 < -0.999, 0.0, 0.5 * (1 + torch.erf((x_0 - mean - 1 / 255) / deviation)))
    nll = -(above - below).clamp(min=1e-12).log()
    bound = torch.where((t == 0).view(-1, 1, 1, 1), nll, kl).mean((1, 2, 3)) / math.log(2)
    return mse + bound, mse


# ------------------------------------------------------------------------------------------------------- the stages


def album(
    network: Network,
    diffusion: Diffusion,
    y: Tensor,
    *,
    noise_step: int,
    interval: int,
    scale: float,
    generators: Sequence[Generator],
    on_step: Progress | None = None,
) -> Tensor:
    """One picture after the other, (N,3,H,W), from ``y`` (3,H,W)."""
    pictures = []
    for generator in generators:
        pictures.append(denoised(network, diffusion, y[None], noise_step, interval, scale, generator, on_step))
    return torch.cat(pictures)


def restored(
    network: Network,
    diffusion: Diffusion,
    y: Tensor,
    *,
    noise_step: int,
    generator: Generator,
    on_step: Progress | None = None,
) -> Tensor:
    """The restored picture (1,3,H,W) of ``y`` (3,H,W)."""
    return denoised(network, diffusion, y[None], noise_step, 0, 0.0, generator, on_step)


def denoised(
    network: Network,
    diffusion: Diffusion,
    y: Tensor,
    noise_step: int,
    interval: int,
    scale: float,
    generator: Generator,
    on_step: Progress | None = None,
) -> Tensor:
    """Noise ``y`` (1,3,H,W) to index K - 1 and take K steps back; every ``interval`` of them is guided (0: none)."""
    first = torch.full((1,), noise_step - 1, device=y.device)
    x = diffusion.noised(y, first, _normal(y.shape[1:], generator, y.device)[None])
    for i in reversed(range(noise_step)):
        t = torch.tensor([i], device=y.device)
        guided = interval > 0 and (i + 1) % interval == 0
        with torch.set_grad_enabled(guided):
            x = x.detach().requires_grad_(guided)
            output = network(x, t)
            clean = diffusion.clean(x, t, output[:, :3]).clamp(-1, 1)
            after = diffusion.mean(clean, x, t)
            if i > 0:
                noise = _normal(y.shape[1:], generator, y.device)[None]
                after = after + (0.5 * diffusion.log_variance(output[:, 3:], t)).exp() * noise
            if guided:
                distance = torch.linalg.vector_norm(y - clean, dim=(1, 2, 3)).sum()
                after = after.detach() - scale * torch.autograd.grad(distance, x)[0]
        x = after
        if on_step is not None:
            on_step(noise_step - i, noise_step)
    return x.detach()


def fine_tuned(
    network: Network,
    diffusion: Diffusion,
    anchors: Tensor,
    *,
    iterations: int,
    batch_size: int,
    learning_rate: float,
    draws: Generator,
    t_end: int = 1000,
    on_step: Progress | None = None,
) -> Network:
    """A copy of ``network`` trained on ``anchors`` (N,3,H,W)."""
    tuned = Network(network.weights, network.config)
    tuned.training = True
    parameters = list(tuned.weights.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    for i in range(iterations):
        rows = torch.randint(len(anchors), (batch_size,), generator=draws, device=draws.device)
        t = torch.randint(t_end, (batch_size,), generator=draws, device=draws.device).to(anchors.device)
        eps = _normal((batch_size, *anchors.shape[1:]), draws, anchors.device)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        total, mse = loss_of(tuned, diffusion, anchors[rows.to(anchors.device)], t, eps)
        total.mean().backward()
        with torch.no_grad():  # what a log line costs
            float(total.mean()), float(mse.mean()), float((total - mse).mean())
            for parameter in parameters:
                float(parameter.norm())
                if parameter.grad is not None:
                    float(parameter.grad.norm())
        optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(average, parameters, strict=True):
                mean.mul_(EMA_RATE).add_(parameter, alpha=1 - EMA_RATE)
        if on_step is not None:
            on_step(i + 1, iterations)
    for parameter in parameters:
        parameter.requires_grad_(False)
    tuned.training = False
    return tuned


def _normal(shape: Sequence[int], generator: Generator, device: torch.device) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, device=generator.device).to(device)
