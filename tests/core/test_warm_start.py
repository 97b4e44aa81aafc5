"""The shared warm start: which faces are clean, and that what they have in common is learned."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.data import astronaut
from torch import Tensor

from rgcp_core.errors import UserError
from rgcp_core.people import AlbumFace
from rgcp_core.personal_album import FoundFace, grey
from rgcp_core.prior import Prior
from rgcp_core.settings import ConstrainSettings
from rgcp_core.warm_start import FEWEST, WARM_START, choose_clean, detail, noise_sigma, warm_start

QUICK = ConstrainSettings(iterations=40, batch_size=4, learning_rate=2e-3)


def picture(levels: np.ndarray) -> Tensor:
    """Grey levels (H,W) as (3,H,W) in [-1,1]."""
    return torch.as_tensor(levels / 127.5 - 1, dtype=torch.float32).expand(3, -1, -1)


def portrait() -> np.ndarray:
    """Grey levels (64,64) of a sharp face."""
    return grey(torch.as_tensor(astronaut()[:256:4, 96:352:4] / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1))


def found(crop: Tensor, pixels: float = 200.0, name: str = "a.png") -> FoundFace:
    return FoundFace(AlbumFace(photo=name, pixels=pixels), crop, torch.ones(1))


@pytest.mark.parametrize("sigma", [2.0, 10.0, 30.0])
def test_the_strength_of_white_noise_is_found(sigma: float) -> None:
    rng = np.random.default_rng(0)
    assert noise_sigma(128 + sigma * rng.standard_normal((401, 300))) == pytest.approx(sigma, rel=0.03)
    assert noise_sigma(np.add.outer(np.arange(64.0), np.arange(64.0))) == 0, "a slope is no noise"


def test_blur_noise_and_fading_take_detail_away() -> None:
    levels, rng = portrait(), np.random.default_rng(0)
    clean = detail(picture(levels))
    assert clean > 0
    assert detail(picture(gaussian_filter(levels, 1))) < 0.5 * clean
    assert detail(picture(levels + 15 * rng.standard_normal(levels.shape))) < 0.5 * clean
    # contrast enters squared, since a variance does
    assert detail(picture(128 + 0.5 * (levels - 128))) == pytest.approx(0.25 * clean, rel=1e-3)


def blocks(rng: np.random.Generator, contrast: float) -> np.ndarray:
    """Grey levels (32,32): squares of 4 x 4 pixels with sharp edges and no noise."""
    return 128 + contrast * np.kron(rng.standard_normal((8, 8)), np.ones((4, 4)))


def faces_of_an_archive() -> list[FoundFace]:
    """Twenty sharp ones of falling contrast, each unlike the others; ten blurred, one copy, one small."""
    rng = np.random.default_rng(1)
    sharp = [blocks(rng, 40 - i) for i in range(20)]
    faces = [found(picture(levels), name=f"{i}.png") for i, levels in enumerate(sharp)]
    blurred = [found(picture(gaussian_filter(blocks(rng, 40), 4))) for _ in range(10)]
    small = found(picture(blocks(rng, 50)), pixels=20.0)
    copied = found(picture(sharp[3] * 0.98 + 3))
    return [*blurred, *faces, small, copied]


def test_the_cleaner_half_is_taken_and_every_face_is_accounted_for() -> None:
    faces = faces_of_an_archive()
    clean = choose_clean(faces, most=100)
    assert clean.found == len(faces)
    assert clean.left_out["too small"] == 1
    assert clean.left_out["copies of another"] == 1
    assert clean.left_out["blurred, noisy or faded"] == 10
    assert len(clean.crops) == 15, "half of the 30 that are large enough and there only once"
    assert len(clean.crops) + sum(clean.left_out.values()) == len(faces)
    details = [detail(crop) for crop in clean.crops]
    assert details == sorted(details, reverse=True)
    assert len(choose_clean(faces, most=9).crops) == 9
    with pytest.raises(UserError, match=r"8 of them.*10 blurred"):
        choose_clean(faces, most=FEWEST - 1)


def archive_of(count: int, seed: int = 0) -> Tensor:
    """(N,3,16,16): all dark above and light below, with something of their own."""
    common = torch.linspace(-0.9, 0.9, 16).view(1, 1, 16, 1)
    own = 0.1 * torch.randn((count, 3, 16, 16), generator=torch.Generator().manual_seed(seed))
    return (common + own).clamp(-1, 1)


def test_what_the_faces_share_is_learned_and_the_prior_is_left_alone(tiny_prior: Prior) -> None:
    before = {key: value.clone() for key, value in tiny_prior.network.state_dict().items()}
    warm = warm_start(tiny_prior, archive_of(12), QUICK, precision="float32", seed=0, unit="attic")
    assert warm.loss_after < 0.9 * warm.loss_before
    for key, value in tiny_prior.network.state_dict().items():
        assert torch.equal(value, before[key])


def test_faces_held_out_are_not_trained_on(tiny_prior: Prior) -> None:
    crops = archive_of(12)
    other = crops.clone()
    other[3::4] = archive_of(3, seed=5)  # every fourth is held out: the weights cannot tell
    first = warm_start(tiny_prior, crops, QUICK, precision="float32", seed=0, unit="attic")
    second = warm_start(tiny_prior, other, QUICK, precision="float32", seed=0, unit="attic")
    for key, value in first.prior.network.state_dict().items():
        assert torch.equal(value, second.prior.network.state_dict()[key])
    assert first.loss_after != second.loss_after


def test_what_does_not_carry_over_is_refused(tiny_prior: Prior) -> None:
    still = QUICK.model_copy(update={"iterations": 0})
    with pytest.raises(UserError, match="brought nothing"):
        warm_start(tiny_prior, archive_of(12), still, precision="float32", seed=0, unit="attic")
    with pytest.raises(UserError, match="8 faces"):
        warm_start(tiny_prior, archive_of(5), QUICK, seed=0, unit="attic")


def test_a_warm_prior_serves_all_times() -> None:
    assert WARM_START.times == "all"
