"""Seeded degradations in physical units, for controlled evaluation: a known damage on a known clean picture.

``KINDS`` lists them with their parameters. Every random number comes from (seed, kind), and every value that
was used is recorded, so ``degrade(image, d.kind, d.seed, **d.parameters)`` gives the picture of ``d`` again.
"""

import io
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter
from scipy.signal import fftconvolve
from torch import Tensor

from rgcp_core.errors import UserError
from rgcp_core.images import LUMA, from_uint8, to_uint8

Picture = np.ndarray
"""(3,H,W) float32 RGB, nominally in [-1,1]; ``degrade`` clips once, at the end."""


@dataclass(frozen=True)
class Parameter:
    """One level of a degradation. A pair as default is drawn uniformly from that range."""

    default: float | tuple[float, float]
    low: float
    high: float
    unit: str
    about: str
    whole: bool = False
    """Whole numbers only."""
    at_512: bool = False
    """The default range is meant for a 512 px face and scales with the picture (see ``blind``)."""


@dataclass(frozen=True)
class Kind:
    """A degradation: what it does, and its parameters by name."""

    about: str
    apply: Callable[..., Picture]
    parameters: Mapping[str, Parameter]


@dataclass(frozen=True)
class Degraded:
    """A degraded picture and all that is needed to make it again."""

    image: Tensor
    """(3,H,W) float32 in [-1,1], the size of the input."""
    kind: str
    parameters: dict[str, float]
    """Every value used, the drawn ones included; plain numbers, fit for JSON."""
    seed: int


def degrade(image: Tensor, kind: str, seed: int, **parameters: float) -> Degraded:
    """Degrade one picture in a reproducible way.

    Pictures of one data set want different seeds: the same seed means the same noise field.

    Args:
        image: (3,H,W) in [-1,1], any size.
        kind: a key of ``KINDS``.
        seed: 0 or more.
        parameters: levels of that kind, in its units; the others keep their default.

    Raises:
        UserError: an unknown kind or parameter, a level outside its limits, or no such picture.
    """
    if kind not in KINDS:
        raise UserError(f"Unknown degradation '{kind}'. Choose one of: {', '.join(KINDS)}.")
    if seed < 0:
        raise UserError(f"A degradation's seed must be 0 or more; got {seed}.")
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point() or image.numel() == 0:
        raise UserError(f"Expected a float picture (3,H,W); got {image.dtype} of shape {tuple(image.shape)}.")
    if not bool((image.abs() <= 1 + 1e-4).all()):
        raise UserError("Expected a picture with values in [-1,1]; load it with rgcp_core.images.")
    used = _levels(kind, seed, min(image.shape[1:]), parameters)
    # The noise has a stream of its own, so that giving a level that would be drawn does not change the noise.
    picture = KINDS[kind].apply(image.detach().cpu().float().numpy(), _stream(seed, kind, "noise"), **used)
    clipped = torch.from_numpy(np.clip(picture, -1, 1).astype(np.float32))
    return Degraded(clipped.to(image.device), kind, used, seed)


def _stream(seed: int, kind: str, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(f"{kind}/{purpose}".encode())])


def _levels(kind: str, seed: int, size: int, given: Mapping[str, float]) -> dict[str, float]:
    """The level of every parameter: given, else drawn, else its default."""
    known = KINDS[kind].parameters
    if unknown := sorted(set(given) - set(known)):
        raise UserError(f"'{kind}' has no parameter {', '.join(map(repr, unknown))}. It has: {', '.join(known)}.")
    rng = _stream(seed, kind, "levels")
    used: dict[str, float] = {}
    for name, parameter in known.items():
        if isinstance(parameter.default, tuple):
            scale = min(1.0, size / 512) if parameter.at_512 else 1.0
            low, high = (max(parameter.low, scale * end) for end in parameter.default)
            default = round(float(rng.uniform(low, high)), 3)
        else:
            default = parameter.default
        value = given.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{kind}: {name} must be a number ({parameter.unit}); got {value!r}.")
        if not parameter.low <= value <= parameter.high:
            limits = f"{parameter.low:g}..{parameter.high:g} ({parameter.unit})"
            raise UserError(f"{kind}: {name} must lie in {limits}; got {value:g}.")
        used[name] = round(value) if parameter.whole else float(value)
    return used


# The degradations: each takes (picture, rng, its levels) and returns a picture of the same size.


def _resize(x: Picture, height: int, width: int) -> Picture:
    """Bicubic and antialiased, with Pillow's kernel, but in float."""
    batch = torch.from_numpy(x.astype(np.float32))[None]
    return F.interpolate(batch, (height, width), mode="bicubic", antialias=True)[0].numpy()


def _shrink(x: Picture, factor: float) -> Picture:
    return _resize(x, max(1, round(x.shape[1] / factor)), max(1, round(x.shape[2] / factor)))


def _low_resolution(x: Picture, rng: np.random.Generator, factor: float) -> Picture:
    return _resize(_shrink(x, factor), *x.shape[1:])


def _gaussian_blur(x: Picture, rng: np.random.Generator, sigma: float) -> Picture:
    return gaussian_filter(x, (0, sigma, sigma))


def _motion_blur(x: Picture, rng: np.random.Generator, length: float, angle: float) -> Picture:
    """Mean of the picture along a straight path centred on the pixel, sampled 16 times a pixel."""
    count = max(1, math.ceil(16 * length))
    along = ((np.arange(count) + 0.5) / count - 0.5) * length
    radius = math.ceil(length / 2)
    row = radius - along * math.sin(math.radians(angle))  # rows count downwards
    column = radius + along * math.cos(math.radians(angle))
    kernel = np.zeros((1, 2 * radius + 2, 2 * radius + 2))
    top, left = np.floor(row).astype(int), np.floor(column).astype(int)
    for down in (0, 1):
        for right in (0, 1):  # a sample between pixels is shared among its four neighbours
            weight = np.abs(1 - down - (row - top)) * np.abs(1 - right - (column - left))
            np.add.at(kernel[0], (top + down, left + right), weight / count)
    edge = (radius, radius + 1)
    padded = np.pad(x, ((0, 0), edge[::-1], edge[::-1]), mode="symmetric")
    return fftconvolve(padded, kernel, mode="valid", axes=(1, 2))


def _gaussian_noise(x: Picture, rng: np.random.Generator, sigma: float) -> Picture:
    return x + rng.normal(0, sigma * 2 / 255, x.shape)  # 255 levels span the 2 units from -1 to 1


def _poisson_noise(x: Picture, rng: np.random.Generator, peak: float) -> Picture:
    photons = rng.poisson(np.clip((x + 1) / 2, 0, 1) * peak)
    return photons / peak * 2 - 1


def _jpeg(x: Picture, rng: np.random.Generator, quality: int) -> Picture:
    file = io.BytesIO()
    Image.fromarray(to_uint8(torch.from_numpy(x))).save(file, format="JPEG", quality=quality)
    return from_uint8(np.asarray(Image.open(file))).numpy()


def _chain(x: Picture, rng: np.random.Generator, blur: float, factor: float, noise: float, quality: int) -> Picture:
    """y = enlarge(JPEG(shrink(x * k, r) + n)): Eq. 10 of GFP-GAN (Wang et al. 2021), enlarged again."""
    small = _gaussian_noise(_shrink(_gaussian_blur(x, rng, blur), factor), rng, noise)
    return _resize(_jpeg(small, rng, quality), *x.shape[1:])


def _fading(
    x: Picture, rng: np.random.Generator, gamma: float, contrast_loss: float, sepia: float, vignette: float
) -> Picture:
    """Paler middle tones, less contrast, toning, darker corners; with v in [0,1] and in this order:

    v <- v^gamma;  v <- v + contrast_loss (0.65 - v);  v <- (1 - sepia) v + sepia luma(v) PAPER;
    v <- v (1 - vignette r^2), with r = 0 in the middle and 1 in the corners.
    """
    v = np.clip((x.astype(np.float64) + 1) / 2, 0, 1) ** gamma
    v = v + contrast_loss * (0.65 - v)  # a light grey: a print loses its blacks before its whites
    luma = np.tensordot(LUMA, v, axes=1)
    v = (1 - sepia) * v + sepia * luma * np.array(PAPER)[:, None, None]
    down, across = (np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in x.shape[1:])
    radius_squared = (down[:, None] ** 2 + across[None, :] ** 2) / 2
    return v * (1 - vignette * radius_squared) * 2 - 1


PAPER = (1.0, 0.88, 0.70)
"""RGB of the yellowed paper that a fully toned white becomes, as shares of white."""

SUPERSAMPLE = 4
"""Damage is drawn this much larger and shrunk, for widths of fractions of a pixel and smooth edges."""


def _scratches(
    x: Picture,
    rng: np.random.Generator,
    scratches: float,
    length: float,
    width: float,
    dust: float,
    dust_radius: float,
    tears: int,
    tear_width: float,
    softness: float,
) -> Picture:
    """Lay light damage (bare paper) and dark damage (dirt, the shadow of a tear) over the picture.

    Counts are rounded, at least one where the density is not 0. A single scratch is 0.3 to 2 times as long
    as ``length`` and 0.5 to 1.5 times as wide as ``width``; a speck has at most 1.6 times ``dust_radius``.
    """
    height, wide = x.shape[1:]
    light, dark = (Image.new("L", (wide * SUPERSAMPLE, height * SUPERSAMPLE)) for _ in range(2))

    def stroke(mask: Image.Image, points: np.ndarray, thickness: float, opacity: float) -> None:
        path = [(float(px), float(py)) for px, py in points * SUPERSAMPLE]
        pen = max(1, round(thickness * SUPERSAMPLE))
        ImageDraw.Draw(mask).line(path, fill=round(255 * opacity), width=pen, joint="curve")

    def count(density: float) -> int:
        return max(1, round(density * height * wide / 1e4)) if density > 0 else 0

    for _ in range(count(scratches)):
        start = rng.uniform(0, (wide, height))
        heading, bend = rng.uniform(0, 2 * math.pi), rng.normal(0, 0.3)
        heading_along = heading + bend * np.linspace(0, 1, 12)
        step = length * rng.uniform(0.3, 2) / 12
        points = start + step * np.cumsum(np.stack([np.cos(heading_along), np.sin(heading_along)], 1), axis=0)
        mask = light if rng.random() < 0.8 else dark
        stroke(mask, points, width * rng.uniform(0.5, 1.5), rng.uniform(0.4, 0.95))

    for _ in range(count(dust)):
        centre = rng.uniform(0, (wide, height)) * SUPERSAMPLE
        radii = dust_radius * SUPERSAMPLE * rng.uniform(0.4, 1.6) * rng.uniform(0.6, 1, 2)
        mask = light if rng.random() < 0.6 else dark
        box = (*(centre - radii).tolist(), *(centre + radii).tolist())
        ImageDraw.Draw(mask).ellipse(box, fill=round(255 * rng.uniform(0.5, 1)))

    for _ in range(tears):  # from a border inwards, a kink every few widths
        border = [(0, rng.random()), (1, rng.random()), (rng.random(), 0), (rng.random(), 1)][rng.integers(4)]
        start = np.array(border) * (wide, height)
        inwards = rng.uniform(0.4, 0.9) * (rng.uniform(0.3, 0.7, 2) * (wide, height) - start)
        kinks = 2 + int(np.hypot(*inwards) / (6 * tear_width))
        points = start + np.linspace(0, 1, kinks)[:, None] * inwards + rng.normal(0, tear_width, (kinks, 2))
        stroke(dark, points + tear_width / 2, tear_width, 0.6)
        stroke(light, points, tear_width, 1.0)

    for mask, tone in ((dark, -0.85), (light, 0.9)):
        alpha = gaussian_filter(np.asarray(mask.reduce(SUPERSAMPLE), np.float32) / 255, softness)
        x = x + alpha * (tone - x)
    return x


_BLUR = "blur before shrinking (sigma)"
_SHRINK = "times fewer pixels a side"

KINDS: Mapping[str, Kind] = {
    "low_resolution": Kind(
        "Antialiased shrinking, then bicubic enlarging to the old size.",
        _low_resolution,
        {"factor": Parameter(4.0, 1, 64, "times", _SHRINK)},
    ),
    "gaussian_blur": Kind(
        "Out of focus: isotropic Gaussian blur.",
        _gaussian_blur,
        {"sigma": Parameter(2.0, 0, 100, "px", "standard deviation of the kernel")},
    ),
    "motion_blur": Kind(
        "Camera shake: blur along a straight line.",
        _motion_blur,
        {
            "length": Parameter(9.0, 0, 200, "px", "length of the path"),
            "angle": Parameter(30.0, -360, 360, "deg", "direction, counter-clockwise from horizontal"),
        },
    ),
    "gaussian_noise": Kind(
        "Sensor or film noise: independent in every pixel and channel.",
        _gaussian_noise,
        {"sigma": Parameter(15.0, 0, 255, "8-bit levels", "standard deviation")},
    ),
    "poisson_noise": Kind(
        "Photon noise of a dim exposure; its variance is proportional to the pixel's value.",
        _poisson_noise,
        {"peak": Parameter(100.0, 0.1, 1e6, "photons", "mean count of a white pixel; fewer is noisier")},
    ),
    "jpeg": Kind(
        "JPEG compression as Pillow does it (4:2:0 chroma).",
        _jpeg,
        {"quality": Parameter(20, 1, 100, "JPEG quality", "lower is worse", whole=True)},
    ),
    "scratches": Kind(
        "An old print: scratches, dust and tears with soft edges.",
        _scratches,
        {
            "scratches": Parameter(0.6, 0, 50, "per 100x100 px", "scratches"),
            "length": Parameter(50.0, 1, 2000, "px", "typical length of a scratch"),
            "width": Parameter(1.2, 0.25, 50, "px", "typical width of a scratch"),
            "dust": Parameter(3.0, 0, 100, "per 100x100 px", "specks of dust"),
            "dust_radius": Parameter(0.9, 0.1, 50, "px", "typical radius of a speck"),
            "tears": Parameter(1, 0, 20, "per picture", "tears that come in from the border", whole=True),
            "tear_width": Parameter(1.5, 0.25, 100, "px", "width of a tear"),
            "softness": Parameter(0.4, 0, 10, "px", "blur of all edges (sigma)"),
        },
    ),
    "fading": Kind(
        "A faded print: paler tones, less contrast, yellowing, darker corners.",
        _fading,
        {
            "gamma": Parameter(0.8, 0.2, 5, "exponent", "below 1 pales the middle tones, above 1 darkens"),
            "contrast_loss": Parameter(0.35, 0, 1, "share", "share of the contrast that is gone"),
            "sepia": Parameter(0.7, 0, 1, "share", "share of the colour replaced by yellowed monochrome"),
            "vignette": Parameter(0.25, 0, 1, "share", "light lost in the corners"),
        },
    ),
    # The ranges are the "large degradation" of CodeFormer's training (Zhou et al. 2022), for faces of 512 px.
    # Blur and shrinking scale with the picture's shorter side / 512 (never up: a large photo is not a large
    # face), with a factor of at least 1, so that a 64 px face passes through the same small picture of 17 px
    # and more as one of 512 px. Noise and JPEG act on that small picture and stay as they are.
    "blind": Kind(
        "The random chain of blind face restoration, for face crops: blur, shrink, noise, JPEG, enlarge.",
        _chain,
        {
            "blur": Parameter((1, 15), 0, 100, "px", _BLUR, at_512=True),
            "factor": Parameter((4, 30), 1, 64, "times", _SHRINK, at_512=True),
            "noise": Parameter((0, 20), 0, 255, "8-bit levels", "noise of the small picture"),
            "quality": Parameter((30, 80), 1, 100, "JPEG quality", "JPEG of the small picture", whole=True),
        },
    ),
    "old_photo": Kind(
        "A small, slightly blurred, noisy and compressed photo: the chain of `blind` at one moderate level.",
        _chain,
        {
            "blur": Parameter(1.0, 0, 100, "px", _BLUR),
            "factor": Parameter(3.0, 1, 64, "times", _SHRINK),
            "noise": Parameter(8.0, 0, 255, "8-bit levels", "noise of the small picture"),
            "quality": Parameter(60, 1, 100, "JPEG quality", "JPEG of the small picture", whole=True),
        },
    ),
}
"""Every kind of degradation with its parameters: default, limits, unit and meaning."""
