"""The ADM U-Net (Dhariwal & Nichol 2021), with the state-dict keys of guided-diffusion.

Attribute names and the positions inside ``nn.Sequential`` are therefore not free: they are the checkpoint format.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from rgcp_core.errors import UserError


class UNetConfig(BaseModel):
    """What decides the shape of the network. The defaults are the paper's 256 px column (Table 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(default=256, gt=0, description="Side of the square picture in pixels.")
    in_channels: int = Field(default=3, description="Channels of the picture.")
    out_channels: int = Field(default=6, description="3 for the noise alone, 6 with a learned variance.")
    model_channels: int = Field(default=128, description="Base width that the multipliers refer to.")
    channel_mult: tuple[float, ...] = Field(
        default=(1, 1, 2, 2, 4, 4), description="Width multiplier of each resolution level, finest first."
    )
    num_res_blocks: int = Field(default=2, ge=1, description="Residual blocks a level on the way down.")
    attention_resolutions: tuple[int, ...] = Field(
        default=(16,), description="Feature-map sides in pixels at which self-attention is used."
    )
    num_head_channels: int = Field(default=128, description="Channels of one attention head.")
    use_scale_shift_norm: bool = Field(default=True, description="Time scales and shifts the second norm.")
    resblock_updown: bool = Field(default=True, description="Residual blocks change resolution, not convolutions.")
    use_new_attention_order: bool = Field(default=False, description="Split q, k, v before the heads.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Dropout in the residual blocks while training.")
    norm_eps: float = Field(default=1e-5, gt=0, description="Epsilon of the norms; DDPM's networks have 1e-6.")
    frequency_shift: Literal[0, 1] = Field(
        default=0, description="1: the time embedding's lowest frequency is exactly 1/10000, as in DDPM's networks."
    )
    downsample_padding: Literal["both", "end"] = Field(
        default="both", description="Sides that halving convolutions pad; DDPM's networks: end (bottom and right)."
    )

    @property
    def learn_sigma(self) -> bool:
        """Whether the network also predicts the variance."""
        return self.out_channels == 2 * self.in_channels


PAPER_512 = UNetConfig(
    image_size=512,
    model_channels=256,
    channel_mult=(0.5, 1, 1, 2, 2, 4, 4),
    attention_resolutions=(32, 16, 8),
    num_head_channels=64,
)
"""The paper's 512 px column (Table 1)."""


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0, frequency_shift: int = 0) -> Tensor:
    """Sinusoidal embedding (N, dim) of times ``t`` (N,), cosines first, float32."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / (half - frequency_shift)
    frequencies = torch.exp(-math.log(max_period) * exponents)
    angles = t[:, None].float() * frequencies[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


class Norm(nn.GroupNorm):
    """GroupNorm over 32 groups, computed in float32 whatever the autocast says."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__(32, channels, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N,C,...) and return the input's dtype."""
        if x.dtype == torch.float32:
            return super().forward(x)
        if x.device.type == "cpu" and x.is_contiguous():
            # The kernel sums in float32 by itself; autocast would hand it a float32 copy. Of channels-last its backward
            # pass is several times slower than the copies are.
            with torch.autocast("cpu", enabled=False):
                return super().forward(x)
        return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps).to(x.dtype)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, followed by a convolution unless it serves inside a residual block."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) to (N,C,2H,2W)."""
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Halving by a strided convolution, or by averaging inside a residual block."""

    def __init__(self, channels: int, use_conv: bool, padding: str = "both") -> None:
        super().__init__()
        self.pad_end = use_conv and padding == "end"
        self.op: nn.Module = nn.AvgPool2d(2)
        if use_conv:
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if self.pad_end else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) to (N,C,H/2,W/2)."""
        return self.op(F.pad(x, (0, 1, 0, 1)) if self.pad_end else x)


class ResBlock(nn.Module):
    """Two normalised convolutions around the time embedding, with a skip; may also halve or double the size."""

    def __init__(
        self, channels: int, out_channels: int, config: UNetConfig, *, up: bool = False, down: bool = False
    ) -> None:
        super().__init__()
        emb_channels = 4 * config.model_channels
        self.use_scale_shift_norm = config.use_scale_shift_norm
        self.in_layers = nn.Sequential(
            Norm(channels, config), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.resample: Callable[[Tensor], Tensor] | None = None
        if up:
            self.resample = Upsample(channels, use_conv=False)
        elif down:
            self.resample = Downsample(channels, use_conv=False)
        self.emb_layers = nn.Sequential(
            nn.SiLU(),
            nn.Linear(emb_channels, 2 * out_channels if self.use_scale_shift_norm else out_channels),
        )
        self.out_layers = nn.Sequential(
            Norm(out_channels, config),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(N,C,H,W) and (N,E) to (N,C_out,H',W')."""
        h = self.in_layers[1](self.in_layers[0](x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.in_layers[2](h)
        emb_out = self.emb_layers(emb).to(h.dtype)[..., None, None]
        norm, act, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = torch.addcmul(shift, norm(h), 1 + scale)
        else:
            h = norm(h + emb_out)
        return self.skip_connection(x) + conv(dropout(act(h)))


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map, with a skip."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        if channels % config.num_head_channels:
            raise UserError(
                f"num_head_channels ({config.num_head_channels}) must divide the {channels} channels it attends over."
            )
        self.num_heads = channels // config.num_head_channels
        self.new_order = config.use_new_attention_order
        self.norm = Norm(channels, config)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) to the same shape."""
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm(x.reshape(n, c, -1)))
        shape = (3, self.num_heads) if self.new_order else (self.num_heads, 3)
        qkv = qkv.reshape(n, *shape, c // self.num_heads, -1).transpose(-1, -2)
        q, k, v = qkv.unbind(1 if self.new_order else 2)
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.transpose(-1, -2).reshape(n, c, -1)
        return x + self.proj_out(h).reshape(n, c, height, width)


class Stage(nn.Sequential):
    """Layers of one position of the U; the time embedding goes to those that take it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        """Apply the layers in order."""
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """Noise predictor ``eps(x_t, t)``, with the variance's interpolation ``v`` when the card says so."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        emb_channels = 4 * config.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        widths = [int(mult * config.model_channels) for mult in config.channel_mult]
        size = config.image_size

        channels = widths[0]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(config.in_channels, channels, 3, padding=1))])
        skips = [channels]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(Stage(*self._layers(channels, width, size)))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                down = (
                    ResBlock(channels, channels, config, down=True)
                    if config.resblock_updown
                    else Downsample(channels, use_conv=True, padding=config.downsample_padding)
                )
                self.input_blocks.append(Stage(down))
                skips.append(channels)
                size //= 2

        self.middle_block = Stage(
            ResBlock(channels, channels, config),
            AttentionBlock(channels, config),
            ResBlock(channels, channels, config),
        )

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config.num_res_blocks + 1):
                layers = self._layers(channels + skips.pop(), width, size)
                channels = width
                if level and i == config.num_res_blocks:
                    layers.append(
                        ResBlock(channels, channels, config, up=True)
                        if config.resblock_updown
                        else Upsample(channels, use_conv=True)
                    )
                    size *= 2
                self.output_blocks.append(Stage(*layers))

        self.out = nn.Sequential(
            Norm(channels, config), nn.SiLU(), zeroed(nn.Conv2d(channels, config.out_channels, 3, padding=1))
        )

    def _layers(self, channels: int, width: int, size: int) -> list[nn.Module]:
        layers: list[nn.Module] = [ResBlock(channels, width, self.config)]
        if size in self.config.attention_resolutions:
            layers.append(AttentionBlock(width, self.config))
        return layers

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            x_t: (N,3,H,W) noisy pictures, float32.
            t: (N,) times, 0..T-1.

        Returns:
            (N,3,H,W) eps, or (N,6,H,W) eps and v.
        """
        config = self.config
        emb = self.time_embed(timestep_embedding(t, config.model_channels, frequency_shift=config.frequency_shift))
        h, skips = x_t, []
        for stage in self.input_blocks:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h).to(x_t.dtype)


def zeroed(module: nn.Module) -> nn.Module:
    """Start a layer at zero, so that a fresh residual branch changes nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
