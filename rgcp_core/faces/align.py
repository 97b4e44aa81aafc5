"""Five landmarks -> the FFHQ square -> the part of it that a prior was trained on.

Coordinates are continuous, x to the right and y down: the corner of a picture is (0,0), the centre of its
first pixel (0.5,0.5), so that scaling a picture by s scales its coordinates by s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage.transform import warp as skimage_warp
from torch import Tensor

from ..errors import UnitError, UserError
from ..images import from_uint8

FFHQ_WINDOW = (0.0, 0.0, 1.0, 1.0)
_LANCZOS_REACH = 3  # pixels of the smaller picture


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where a crop of `size` x `size` pixels lies in its photo.

    `matrix` (2,3) float64 leads from continuous crop coordinates (u,v), 0..size, to those of the upright
    photo: (x,y) = matrix @ (u,v,1).
    """

    matrix: NDArray[np.float64]
    size: int

    @property
    def scale(self) -> float:
        """Photo pixels per crop pixel, along a side: above 1 the photo is finer than the crop."""
        return float(np.sqrt(abs(np.linalg.det(self.matrix[:, :2]))))

    @cached_property
    def corners(self) -> NDArray[np.float64]:
        """(4,2) photo coordinates of the crop's corners: top left, top right, bottom right, bottom left."""
        unit = np.array([[0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]]) * [self.size, self.size, 1]
        return unit @ self.matrix.T

    def to_json(self) -> dict[str, Any]:
        """Give a dict that JSON can hold without loss."""
        return {"matrix": self.matrix.tolist(), "size": self.size}

    @staticmethod
    def from_json(record: dict[str, Any]) -> "Alignment":
        """Read what `to_json` gave."""
        return Alignment(np.array(record["matrix"], np.float64).reshape(2, 3), int(record["size"]))


def align_face(
    landmarks: NDArray[np.floating[Any]], size: int, crop_window: Sequence[float] = FFHQ_WINDOW
) -> Alignment:
    """Find the crop that shows a face as the prior's training pictures do.

    `landmarks` (5,2) in photo pixels, as in `Face`; `crop_window` (x0,y0,x1,y1) in fractions of the FFHQ
    square, from the prior's card; `size` the prior's picture size. Landmarks that span no face: `UnitError`
    `bad_landmarks`.

    The FFHQ square is the oriented crop rectangle of Karras et al. 2018 (arXiv 1710.10196, appendix C): with
    e the vector from eye to eye and m the one from the middle of the eyes to the middle of the mouth, its x
    axis points along e - rot90(m), its side is max(4 |e|, 3.6 |m|), and its centre lies 0.1 m from the eyes
    towards the mouth.
    """
    x0, y0, x1, y1 = crop_window
    if landmarks.shape != (5, 2) or size < 1 or not (x0 < x1 and y0 < y1):
        message = f"Expected landmarks (5,2), size >= 1 and a window x0 < x1, y0 < y1, got {landmarks.shape}, "
        raise UserError(message + f"{size} and {tuple(crop_window)}.")
    left_eye, right_eye, _, left_mouth, right_mouth = landmarks.astype(np.float64)
    eyes, mouth = (left_eye + right_eye) / 2, (left_mouth + right_mouth) / 2
    eye_to_eye, eyes_to_mouth = right_eye - left_eye, mouth - eyes

    x_axis = eye_to_eye - _rot90(eyes_to_mouth)
    side = max(4.0 * np.hypot(*eye_to_eye), 3.6 * np.hypot(*eyes_to_mouth))
    if not (np.isfinite(side) and np.hypot(*x_axis) > 1e-6 * side > 0):
        raise UnitError("bad_landmarks", f"The landmarks span no face: {landmarks.round(1).tolist()}.")
    x_axis = x_axis / np.hypot(*x_axis) * side
    y_axis = _rot90(x_axis)
    corner = eyes + 0.1 * eyes_to_mouth - (x_axis + y_axis) / 2

    origin = corner + x0 * x_axis + y0 * y_axis
    matrix = np.stack([x_axis * (x1 - x0) / size, y_axis * (y1 - y0) / size, origin], axis=1)
    return Alignment(matrix, size)


def _rot90(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn by a quarter, from x (right) to y (down)."""
    return np.array([-vector[1], vector[0]])


def crop_face(rgb: NDArray[np.uint8], alignment: Alignment) -> Tensor:
    """Cut a crop (3,size,size) in [-1,1] out of an upright photo (H,W,3) uint8, antialiased.

    Beyond the photo's border the photo is reflected.
    """
    margin = 4 + (_LANCZOS_REACH + 1) * int(np.ceil(alignment.scale * np.sqrt(2)))
    region, (left, top) = _reflected_region(rgb, alignment.corners, margin)
    image = from_uint8(region).permute(1, 2, 0).numpy()
    crop = warp(image, alignment.matrix - [[0, 0, left], [0, 0, top]], (alignment.size, alignment.size))
    return torch.from_numpy(crop).permute(2, 0, 1).clamp(-1, 1).contiguous()


def _reflected_region(
    rgb: NDArray[np.uint8], corners: NDArray[np.float64], margin: int
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Cut out the rectangle around `corners`, reflected beyond the border; also give its (left, top)."""
    left, top = np.floor(corners.min(0)).astype(int) - margin
    right, bottom = np.ceil(corners.max(0)).astype(int) + margin
    rows, columns = np.arange(top, bottom), np.arange(left, right)
    region = rgb[np.ix_(_reflect(rows, rgb.shape[0]), _reflect(columns, rgb.shape[1]))]
    return region, (int(left), int(top))


def _reflect(index: NDArray[np.int_], length: int) -> NDArray[np.int_]:
    """Fold any index into 0..length-1 as mirrors at the borders would: 1 0 | 0 1 2 | 2 1."""
    index = index % (2 * length)
    return np.where(index < length, index, 2 * length - 1 - index)


def warp(image: NDArray[np.float32], matrix: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resample an image (h,w,C) to (height,width,C) for `size` (width, height).

    `matrix` (2,3) leads from continuous output to continuous image coordinates. Bicubic (Catmull-Rom); when
    the output is coarser than the image it is first sampled as densely as the image and then shrunk with
    Lanczos, so that nothing aliases. Both reproduce linear ramps. Beyond its border the image is continued by
    its edge.
    """
    width, height = size
    scale = np.sqrt(abs(np.linalg.det(matrix[:, :2])))
    factor = max(1, int(np.ceil(scale - 1e-6)))
    reduction = factor // 4
    if reduction > 1:  # averaging blocks first is much quicker; what is left is at least 4 times as fine
        image = np.stack([np.asarray(plane.reduce(reduction)) for plane in _planes(image)], axis=-1)
        matrix, factor = matrix / reduction, int(np.ceil(scale / reduction - 1e-6))
    margin = _LANCZOS_REACH if factor > 1 else 0

    # The centre of dense pixel i lies at (i + 0.5) / factor - margin; scikit-image counts from pixel centres.
    step, start = 1 / factor, 0.5 / factor - margin
    dense_to_output = np.array([[step, 0, start], [0, step, start], [0, 0, 1]])
    to_index = np.vstack([matrix, [0, 0, 1]]) @ dense_to_output - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]
    shape = (height + 2 * margin) * factor, (width + 2 * margin) * factor
    options = {"order": 3, "mode": "edge", "clip": False, "preserve_range": True}
    dense = skimage_warp(image, to_index, output_shape=shape, **options).astype(np.float32)
    if factor == 1:
        return dense
    # Lanczos cuts its kernel at a border, and bends ramps there; so it gets a margin, which is cut off.
    shrunk_size = (width + 2 * margin, height + 2 * margin)
    shrunk = [plane.resize(shrunk_size, Image.Resampling.LANCZOS) for plane in _planes(dense)]
    return np.stack([np.asarray(plane) for plane in shrunk], axis=-1)[margin:-margin, margin:-margin]


def _planes(image: NDArray[np.float32]) -> list[Image.Image]:
    return [Image.fromarray(plane) for plane in np.moveaxis(image, -1, 0)]
