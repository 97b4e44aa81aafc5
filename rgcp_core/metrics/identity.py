"""Is it the same person? Cosine similarity of face embeddings; the metric's name says which network it is.

A recognition network wants its own face chip, cut by landmarks. Crops of the FFHQ square have their eyes and
mouth in nearly the same place, so the chip is cut at a fixed place instead of finding landmarks again: that
needs no look at the face and so cannot be led astray by blur, nor treat the damaged and the restored picture
differently.

Measured for dlib on 59 crops of 9 people (173 pairs of one person, 1,538 of two; window
[0.195,0.285,0.835,0.925]), area under the ROC curve, and in brackets the share of same-person pairs found at
1 % false matches:

| crops                          | fixed chip      | 5 landmarks found by dlib | 68 landmarks    |
|--------------------------------|-----------------|---------------------------|-----------------|
| 128 px                         | 1.000 (100 %)   | 1.000 (100 %)             | 1.000 (100 %)   |
| 64 px                          | 1.000 (100 %)   | 1.000 (100 %)             | 1.000 (100 %)   |
| 64 px, Gaussian blur sigma 1.5 | 0.9992 (97 %)   | 0.9989 (97 %)             | 0.9985 (95 %)   |
| 16 px enlarged to 64 px        | 0.993 (79 %)    | 0.987 (71 %)              | 0.989 (76 %)    |

At 64 and 128 px the cosine is 0.968 on average for one person and 0.851 for two, and 1 % of the pairs of two
people lie above 0.925: dlib's embeddings are not centred, so a cosine of 0.85 means nothing. Degradation
pushes strangers together (0.883 at 16 px), so compare methods at one size and damage, never a value with the
threshold of another. A chip 9 % smaller, 10 % larger or 2 % of the square higher or lower does worse at 16 px
(0.985 to 0.988).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rgcp_core.errors import UserError
from rgcp_core.images import to_uint8
from rgcp_core.weights import load_state_dict, require_weights

Window = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in fractions of the FFHQ square, as on a prior's card; (0, 0, 1, 1) is all of it."""

DLIB_CHIP: Window = (0.1502, 0.2576, 0.8498, 0.9572)
"""Where dlib's chip (150 px, padding 0.25) lies: the least-squares similarity of dlib's mean face to the
median of the five landmarks that its predictor finds in 600 aligned crops (eye corners and base of the nose,
see the tests)."""

ARCFACE_CHIP: Window = (0.1291, 0.1228, 0.8729, 0.8665)
"""Where ArcFace's 112 px chip lies: the least-squares similarity of its template (Deng et al. 2019, five
points) to the five points of an average FFHQ face."""


@dataclass(frozen=True)
class IdentityModel:
    """A face recognition network that takes crops of the FFHQ square."""

    name: str
    """`dlib_resnet_v1` or `arcface_ir_se50`."""
    threshold: float | None
    """Cosine that 1 % of the pairs of two different people exceed; None where it was not measured."""
    chip: Window
    chip_size: int
    network: Callable[[Tensor], Tensor]
    """Chips (N,3,chip_size,chip_size) in [-1,1], RGB -> (N,D)."""

    def embed(self, images: Tensor, crop_window: Window) -> Tensor:
        """Embeddings (N,D), of length 1, of aligned faces.

        Args:
            images: (N,3,H,H) in [-1,1]; any size.
            crop_window: the part of the FFHQ square that they show, from the prior's card.
        """
        chips = face_chip(images, crop_window, self.chip, self.chip_size)
        with torch.no_grad():
            return F.normalize(self.network(chips), dim=1)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity (N,) of embeddings (N,D) or (1,D), in [-1,1]; 1 is the same face."""
    return F.cosine_similarity(a, b, dim=1)


def load_identity(name: str = "auto", device: torch.device | str = "cpu") -> IdentityModel:
    """Load a recognition network.

    Args:
        name: `dlib`, `arcface`, or `auto`: ArcFace when its weights are here (the paper's metric), otherwise
            dlib.
        device: for ArcFace; dlib's network runs on the CPU.

    Raises:
        UserError: unknown name, or the weights are not on this machine.
    """
    if name == "auto":
        try:
            return _load_arcface(device)
        except UserError:
            return _load_dlib()
    if name == "arcface":
        return _load_arcface(device)
    if name == "dlib":
        return _load_dlib()
    raise UserError(f"There is no identity network {name!r}. Known: auto, arcface, dlib.")


def face_chip(images: Tensor, crop_window: Window, chip: Window, size: int) -> Tensor:
    """Cut one window of the FFHQ square, at a given size, out of pictures that show another.

    Args:
        images: (N,3,H,H) in [-1,1].
        crop_window: what `images` show; what the chip needs beyond it is filled with the nearest pixel of the
            border (measured: black costs much more, a mirror image is as good).
        chip: the square window to cut.
        size: side of the result in pixels.

    Returns:
        (N,3,size,size) in [-1,1], bicubic; a crop larger than needed is first reduced with antialiasing.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise UserError(f"Expected square aligned faces (N,3,H,H), got {tuple(images.shape)}.")
    x0, y0, x1, y1 = crop_window
    if not (x0 < x1 and y0 < y1):
        raise UserError(f"A crop window is x0, y0, x1, y1 with x0 < x1 and y0 < y1, got {crop_window}.")
    needed = math.ceil(size * (x1 - x0) / (chip[2] - chip[0]))  # the crop's side at the chip's resolution
    if images.shape[2] > needed:
        images = F.interpolate(images.float(), (needed, needed), mode="bicubic", antialias=True)
    unit = (torch.arange(size, dtype=torch.float32, device=images.device) + 0.5) / size
    x = (chip[0] + unit * (chip[2] - chip[0]) - x0) / (x1 - x0)
    y = (chip[1] + unit * (chip[3] - chip[1]) - y0) / (y1 - y0)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1) * 2 - 1  # the crop's edges are -1 and 1
    chips = F.grid_sample(
        images.float(),
        grid.expand(len(images), -1, -1, -1),
        mode="bicubic",
        padding_mode="border",
        align_corners=False,
    )
    return chips.clamp(-1, 1)


def _load_dlib() -> IdentityModel:
    import dlib

    net = dlib.face_recognition_model_v1(str(require_weights("dlib_resnet_v1")))

    def network(chips: Tensor) -> Tensor:
        if not len(chips):
            return chips.new_zeros(0, 128)
        return torch.tensor([list(e) for e in net.compute_face_descriptor(list(to_uint8(chips)))])

    return IdentityModel("dlib_resnet_v1", 0.925, DLIB_CHIP, 150, network)


def _load_arcface(device: torch.device | str) -> IdentityModel:
    path = require_weights("arcface_ir_se50")
    net = arcface_network()
    try:
        net.load_state_dict(load_state_dict(path), assign=True)
    except RuntimeError as error:
        raise UserError(f"{path}: expected facexlib's ArcFace (IR-SE-50). {error}") from error
    net = net.to(device).eval().requires_grad_(False)

    def network(chips: Tensor) -> Tensor:
        return net(chips.flip(1).to(device)).cpu()  # BGR, as those who use these weights feed it

    return IdentityModel("arcface_ir_se50", None, ARCFACE_CHIP, 112, network)


def arcface_network() -> Any:
    """facexlib's IR-SE-50 without weights: parameters on the meta device, to be assigned."""
    from facexlib.recognition.arcface_arch import Backbone  # init_recognition_model would download

    with torch.device("meta"):
        return Backbone(num_layers=50, drop_ratio=0.6, mode="ir_se")
