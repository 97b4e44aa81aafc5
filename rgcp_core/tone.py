"""A monochrome print stays monochrome: the prior knows colour photos only and would give a sepia face blue eyes."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.polynomial import Polynomial
from torch import Tensor

from rgcp_core.images import LUMA

TONED_WITHIN = 2.5
"""Levels of 255 that the colours of a toned print are off their curve (root mean square of Cb and Cr together). Of 226
held-out faces in colour the least colourful has 2.84; the same faces in sepia have 0.05 at most, 1.94 when unevenly
faded or with white noise of 15 levels, and 2.7 as a JPEG of quality 30 at 64 pixels."""
_SIDE = 8
"""Colours are compared as means over so many by so many fields: noise is not colour."""


def keep_tone(pictures: Tensor, y: Tensor) -> Tensor:
    """Restored pictures in the tone of a monochrome or toned face; as they are when the face has colours of its own.

    In a toned print the colour follows from the brightness. That curve, a parabola, is fitted to the damaged face; the
    pictures keep their brightness and take their colours from it.

    Args:
        pictures: (N,3,H,W) in [-1,1].
        y: (3,H,W) in [-1,1], the damaged face.
    """
    luma, red, blue = (part.flatten() for part in _split(F.adaptive_avg_pool2d(y, _SIDE)))
    red_of, blue_of = _curve(luma, red), _curve(luma, blue)
    off_red, off_blue = 0.713 * (red - red_of(luma)), 0.564 * (blue - blue_of(luma))  # Cr and Cb
    if 127.5 * np.sqrt(np.mean(off_red**2 + off_blue**2)) > TONED_WITHIN:
        return pictures
    brightness = _split(pictures)[0]
    seen = brightness.clip(luma.min(), luma.max())
    r, b = brightness + red_of(seen), brightness + blue_of(seen)
    g = (brightness - LUMA[0] * r - LUMA[2] * b) / LUMA[1]
    toned = torch.from_numpy(np.stack([r, g, b], axis=-3)).clamp(-1, 1)
    return toned.to(pictures)


def _split(pictures: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Luma, red minus luma and blue minus luma of (...,3,H,W), each (...,H,W) in double precision."""
    r, g, b = pictures.detach().cpu().double().unbind(-3)
    luma = LUMA[0] * r + LUMA[1] * g + LUMA[2] * b
    return luma.numpy(), (r - luma).numpy(), (b - luma).numpy()


def _curve(luma: np.ndarray, colour: np.ndarray) -> Polynomial:
    """Least-squares parabola; ``full`` also takes a face of one brightness, where any will do."""
    curve, _ = Polynomial.fit(luma, colour, 2, domain=[-1, 1], full=True)
    return curve
