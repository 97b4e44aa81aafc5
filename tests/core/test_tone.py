"""A restored face in the colours of its print, against prints whose tone is known."""

import numpy as np
import pytest
import torch
from skimage import data
from torch import Tensor

from rgcp_core.tone import keep_tone

LEVEL = 1 / 127.5
LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]


@pytest.fixture(scope="module")
def face() -> Tensor:
    """64 px of the astronaut, in [-1,1]."""
    crop = np.ascontiguousarray(data.astronaut()[40:168:2, 160:288:2])
    return torch.from_numpy(crop).permute(2, 0, 1).float() / 127.5 - 1


def luma(picture: Tensor) -> Tensor:
    return (picture * LUMA).sum(0)


def printed(face: Tensor, warmth: float = 0.25) -> Tensor:
    """A toned print: each channel another power of one brightness, as a dye absorbs (Beer and Lambert)."""
    light = 0.1 + 0.8 * (luma(face) / 2 + 0.5)
    return torch.stack([light ** (1 - warmth), light, light ** (1 + warmth)]) * 2 - 1


def coloured(picture: Tensor) -> Tensor:
    """The same brightness with colours that the print does not have: red on the left, blue on the right."""
    side = torch.linspace(-0.15, 0.15, picture.shape[-1])
    return picture + torch.stack([-side, (0.299 * side - 0.114 * side) / 0.587, side])[:, None]


@pytest.mark.parametrize("noise", [0.0, 10.0])
def test_a_picture_gets_the_tone_of_its_print(face: Tensor, noise: float) -> None:
    y = printed(face)
    y = y + torch.randn(y.shape, generator=torch.Generator().manual_seed(0)) * noise * LEVEL
    clean = printed(face.flip(-1))  # brightness elsewhere than in y
    drawn = torch.stack([coloured(clean), coloured(clean * 0.9)])
    toned = keep_tone(drawn, y)
    for picture, before in zip(toned, drawn, strict=True):
        assert torch.allclose(luma(picture), luma(before), atol=0.1 * LEVEL), "the brightness is the prior's"
    assert (coloured(clean) - clean).abs().mean() > 7 * LEVEL
    assert (toned[0] - clean).abs().mean() < (1 + 0.1 * noise) * LEVEL


def test_a_grey_face_stays_grey(face: Tensor) -> None:
    toned = keep_tone(face[None], luma(face).expand(3, -1, -1))
    assert torch.allclose(toned[0], luma(face).expand(3, -1, -1), atol=0.1 * LEVEL)
    assert toned.dtype == face.dtype


def test_a_face_in_colour_is_left_alone(face: Tensor) -> None:
    drawn = face.flip(-1)[None]
    assert keep_tone(drawn, face) is drawn


@pytest.mark.filterwarnings("error")
def test_a_face_of_one_brightness_is_no_error(face: Tensor) -> None:
    toned = keep_tone(face[None], torch.zeros(3, 64, 64))
    assert torch.allclose(toned[0], luma(face).expand(3, -1, -1), atol=0.1 * LEVEL)
