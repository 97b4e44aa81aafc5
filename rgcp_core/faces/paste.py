"""Put a restored face back into its photo, and change nothing else."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import UnitError, UserError
from ..images import Photo, native_colours
from .align import Alignment, warp

_EDGE, _FEATHER = 0.96, 0.12
"""Where the mask reaches 0, in half sides from the crop's centre, and how wide its slope is, in sides."""


def paste_face(
    photo: Photo, pixels: NDArray[Any], restored: Tensor, alignment: Alignment
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Blend a restored face into a photo: (new pixels, mask), both as the photo is stored.

    `pixels` are `photo.pixels` or what an earlier paste made of them, in the photo's mode, depth and stored
    orientation; `restored` (3,S,S) in [-1,1] is the crop that `alignment`, found in the upright photo,
    describes. The mask (H,W) in [0,1] is the restored face's share; where it is 0 the pixels are the very
    same. Alpha is not touched.

    Gray takes the face's luma, CMYK its inks; a palette photo takes the nearest of its colours, without
    dithering, and no transparent one; a 1-bit photo is dithered. A restored crop with NaN is a `UnitError`
    `not_finite`.
    """
    if restored.shape != (3, alignment.size, alignment.size) or pixels.shape != photo.pixels.shape:
        expected = f"(3,{alignment.size},{alignment.size}) and pixels {photo.pixels.shape}"
        raise UserError(f"Expected a face {expected}, got {tuple(restored.shape)} and {pixels.shape}.")
    if not torch.isfinite(restored).all():
        raise UnitError("not_finite", "The restored face holds NaN or infinity, so it is not pasted.")
    to_photo = _stored_from_upright(photo) @ _square(alignment.matrix)
    corners = Alignment(to_photo[:2], alignment.size).corners
    height, width = pixels.shape[:2]
    left, top = np.floor(corners.min(0)).astype(int).clip(0, [width, height])
    right, bottom = np.ceil(corners.max(0)).astype(int).clip(0, [width, height])
    mask = np.zeros((height, width), np.float32)
    pixels = pixels.copy()
    if left == right or top == bottom:
        return pixels, mask

    shift = np.array([[1, 0, left], [0, 1, top], [0, 0, 1]])
    to_crop = (np.linalg.inv(to_photo) @ shift)[:2]
    crop = restored.detach().float().cpu().permute(1, 2, 0).numpy()
    face = native_colours(photo, warp(crop, to_crop, (right - left, bottom - top)))
    share = _feathered(to_crop, alignment.size, (right - left, bottom - top))
    region = pixels[top:bottom, left:right]
    region[share > 0] = _blend(photo, region, face, share)[share > 0]
    mask[top:bottom, left:right] = share
    return pixels, mask


def _square(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.vstack([matrix, [0, 0, 1]])


def _stored_from_upright(photo: Photo) -> NDArray[np.float64]:
    """Give the (3,3) matrix from the upright photo's coordinates to those of its stored pixels."""
    width, height = photo.size
    x, y = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    if photo.orientation in (2, 3, 6, 7):
        x = [-1.0, 0.0, width]
    if photo.orientation in (3, 4, 7, 8):
        y = [0.0, -1.0, height]
    rows = [y, x] if photo.orientation in (5, 6, 7, 8) else [x, y]
    return np.array([*rows, [0.0, 0.0, 1.0]])


def _feathered(to_crop: NDArray[np.float64], crop_size: int, size: tuple[int, int]) -> NDArray[np.float32]:
    """Give the mask (height,width) for `size`: 1 in the middle of the crop, 0 from a rounded square inside
    its border.

    `to_crop` (2,3) leads from the mask's continuous coordinates to the crop's. The slope is half a cosine.
    """
    x, y = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    u, v = np.tensordot(to_crop, np.stack([x, y, np.ones_like(x)]), axes=1) / (crop_size / 2) - 1
    radius = (u**4 + v**4) ** 0.25  # 1 on a rounded square that touches the crop's sides
    slope = ((_EDGE - radius) / (2 * _FEATHER)).clip(0, 1)
    return (0.5 - 0.5 * np.cos(np.pi * slope)).astype(np.float32)


def _blend(photo: Photo, region: NDArray[Any], face: NDArray[np.float32], share: NDArray[np.float32]) -> NDArray[Any]:
    """Mix native pixels with a face's native colours (h,w,C), as `native_colours` gives them."""
    share = share[..., None]
    if photo.palette is not None:
        return _blend_palette(photo, photo.palette, region, face, share)
    if photo.mode == "1":
        gray = region[..., None] * np.float32(255) * (1 - share) + face * share
        return np.asarray(Image.fromarray(gray[..., 0].round().astype(np.uint8)).convert("1"))
    flat = region.reshape(*region.shape[:2], -1).copy()
    colours = flat[..., : face.shape[-1]]
    mixed = colours * (1 - share) + face * share
    colours[...] = mixed.round().clip(0, np.iinfo(region.dtype).max)
    return flat.reshape(region.shape)


def _blend_palette(
    photo: Photo,
    palette: NDArray[np.uint8],
    region: NDArray[np.uint8],
    face: NDArray[np.float32],
    share: NDArray[np.float32],
) -> NDArray[np.uint8]:
    alpha = np.full(256, 255)
    if isinstance(photo.transparency, bytes):
        alpha[: len(photo.transparency)] = list(photo.transparency)
    elif isinstance(photo.transparency, int):
        alpha[photo.transparency] = 0
    opaque = np.flatnonzero(alpha[: len(palette)] == 255)
    if len(opaque) == 0:
        return region
    colours = np.resize(palette, (256, 3)).astype(np.float32)
    wanted = colours[region] * (1 - share) + face * share
    choice = colours[opaque]
    # |wanted - c|^2 = |wanted|^2 - 2 wanted.c + |c|^2, whose first term decides nothing; by rows, for memory
    nearest = [opaque[((choice**2).sum(1) - 2 * row @ choice.T).argmin(1)] for row in wanted]
    return np.where(alpha[region] == 255, np.stack(nearest), region).astype(region.dtype)
