"""Each degradation against physics or an independent implementation; seeds and replay."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from rgcp_core.degrade import KINDS, degrade
from rgcp_core.errors import UserError

DRAWS_NOISE = ["gaussian_noise", "poisson_noise", "scratches", "blind", "old_photo"]


@pytest.fixture(scope="module")
def face() -> Tensor:
    """A 96 x 80 px piece of the astronaut, in [-1,1]."""
    crop = np.ascontiguousarray(data.astronaut()[60:156, 180:260])
    return torch.from_numpy(crop).permute(2, 0, 1).float() / 127.5 - 1


def grey(value: float, size: int = 256) -> Tensor:
    return torch.full((3, size, size), value)


def impulse(size: int = 65) -> Tensor:
    image = grey(-1.0, size)
    image[:, size // 2, size // 2] = 1
    return image


def spread(image: Tensor) -> tuple[np.ndarray, float]:
    """Covariance (x to the right, y upwards) in px^2 and total light of an impulse's picture, one channel."""
    light = (image[0].numpy().astype(np.float64) + 1) / 2
    rows, columns = np.indices(light.shape) - light.shape[0] // 2
    points = np.stack([columns.ravel(), -rows.ravel()])
    return np.cov(points, aweights=light.ravel(), ddof=0), light.sum()


def wave(frequency: float) -> Tensor:
    """A horizontal cosine of ``frequency`` cycles per px, (3,128,128)."""
    return torch.cos(2 * math.pi * frequency * (torch.arange(128) + 0.5)).expand(3, 128, 128).clone()


# Physics


@pytest.mark.parametrize("sigma", [1.5, 4.0])
def test_gaussian_blur_has_the_second_moment_of_its_sigma(sigma: float) -> None:
    covariance, light = spread(degrade(impulse(), "gaussian_blur", 0, sigma=sigma).image)
    assert light == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(covariance, sigma**2 * np.eye(2), atol=0.01 * sigma**2)


@pytest.mark.parametrize(("length", "angle"), [(15, 0), (12, 90), (20, 30), (9.5, -60), (21, 135)])
def test_motion_blur_has_its_length_and_angle(length: float, angle: float) -> None:
    covariance, light = spread(degrade(impulse(), "motion_blur", 0, length=length, angle=angle).image)
    assert light == pytest.approx(1, abs=1e-3)
    variances, axes = np.linalg.eigh(covariance)
    # A straight path has variance L^2 / 12 and no width. Sharing a sample at fraction f between two pixels
    # adds f (1 - f) each way: at most 1/4, on average 1/6.
    assert variances[0] <= 1 / 4
    assert math.sqrt(12 * (variances[1] - 1 / 6)) == pytest.approx(length, abs=0.2)
    measured = math.degrees(math.atan2(axes[1, 1], axes[0, 1]))
    assert (measured - angle + 90) % 180 - 90 == pytest.approx(0, abs=0.5)


def test_blurs_keep_a_flat_picture_and_level_zero_changes_nothing(face: Tensor) -> None:
    for kind, none in (("gaussian_blur", {"sigma": 0}), ("motion_blur", {"length": 0})):
        torch.testing.assert_close(degrade(grey(0.3, 40), kind, 0).image, grey(0.3, 40), atol=1e-5, rtol=0)
        torch.testing.assert_close(degrade(face, kind, 0, **none).image, face, atol=1e-5, rtol=0)


def test_low_resolution_removes_what_its_grid_cannot_carry() -> None:
    """Factor 4 leaves 1/8 cycle per px; beyond it nothing may stay, not even as an alias."""
    kept = degrade(wave(0.02), "low_resolution", 0, factor=4).image.std() / wave(0.02).std()
    assert kept > 0.97
    for frequency in (0.21, 0.25, 0.33, 0.45):
        left = degrade(wave(frequency), "low_resolution", 0, factor=4).image.std() / wave(frequency).std()
        assert left < 0.06, frequency


def test_low_resolution_is_pillows_bicubic(face: Tensor) -> None:
    done = degrade(face, "low_resolution", 0, factor=3.2).image
    _, height, width = face.shape
    small = (round(width / 3.2), round(height / 3.2))
    for ours, channel in zip(done, face, strict=True):
        shrunk = Image.fromarray(channel.numpy()).resize(small, Image.Resampling.BICUBIC)
        theirs = np.asarray(shrunk.resize((width, height), Image.Resampling.BICUBIC)).clip(-1, 1)
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-4)


@pytest.mark.parametrize("sigma", [5.0, 20.0])
def test_gaussian_noise_has_its_sigma_in_8_bit_levels(sigma: float) -> None:
    noise = degrade(grey(0.0), "gaussian_noise", 3, sigma=sigma).image.double() * 255 / 2
    n = noise.numel()
    assert abs(noise.mean()) < 4 * sigma / math.sqrt(n)
    assert noise.std().item() == pytest.approx(sigma, rel=4 / math.sqrt(2 * n))
    neighbours = torch.corrcoef(torch.stack([noise[:, :, 1:].flatten(), noise[:, :, :-1].flatten()]))[0, 1]
    channels = torch.corrcoef(noise.flatten(1))[0, 1]
    assert abs(neighbours) < 4 / math.sqrt(n)
    assert abs(channels) < 4 / math.sqrt(n / 3)


@pytest.mark.parametrize(("light", "peak"), [(0.25, 200.0), (0.5, 100.0)])
def test_poisson_noise_has_the_variance_of_its_photon_count(light: float, peak: float) -> None:
    counts = (degrade(grey(2 * light - 1), "poisson_noise", 0, peak=peak).image.double() + 1) / 2 * peak
    n = counts.numel()
    mean = light * peak
    assert counts.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(mean / n))
    # The sample variance of a Poisson count has standard error sqrt((mean + 2 mean^2) / n).
    assert counts.var().item() == pytest.approx(mean, abs=4 * math.sqrt((mean + 2 * mean**2) / n))


@pytest.mark.parametrize("quality", [10, 75])
def test_jpeg_is_pillows_round_trip(face: Tensor, quality: int) -> None:
    pixels = ((face + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    done = degrade(face, "jpeg", 0, quality=quality).image
    ours = ((done + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(ours, np.asarray(Image.open(file)))
    assert (ours != pixels).any()


def test_scratches_touch_a_bounded_share_and_leave_the_rest_alone() -> None:
    image = grey(0.0)
    hundreds = 256**2 / 1e4
    level = degrade(image, "scratches", 0).parameters
    reach = 4 * level["softness"] + 1  # the blur's support, and one pixel of the grid

    def stroke(length: float, width: float) -> float:
        return (length + width + 2 * reach) * (width + 2 * reach)

    for seed in range(5):
        done = degrade(image, "scratches", seed)
        bound = round(level["scratches"] * hundreds) * stroke(2 * level["length"], 1.5 * level["width"])
        bound += round(level["dust"] * hundreds) * stroke(0, 3.2 * level["dust_radius"])
        bound += level["tears"] * stroke(1.5 * 256, 2.5 * level["tear_width"])  # at most; with its shadow
        touched = (done.image != image).any(0)
        assert 0.005 < touched.double().mean() < bound / 256**2
        assert bound / 256**2 < 0.25
        assert done.image.max() > 0.5  # bare paper
        assert done.image.min() < -0.3  # dirt


def test_scratches_of_no_density_change_nothing(face: Tensor) -> None:
    done = degrade(face, "scratches", 0, scratches=0, dust=0, tears=0)
    assert torch.equal(done.image, face)


def test_scratch_density_is_per_area() -> None:
    """Dust alone: four times the area has four times the specks, so the same share of touched pixels."""
    shares = []
    for size in (250, 500):
        image = grey(0.0, size)
        done = degrade(image, "scratches", 0, scratches=0, tears=0, dust=20, softness=0)
        shares.append((done.image != image).any(0).double().mean().item())
    assert shares[0] == pytest.approx(shares[1], rel=0.15)


def test_fading_of_mid_grey_by_the_formula() -> None:
    plain = {"gamma": 2.0, "contrast_loss": 0.5, "sepia": 0.0, "vignette": 0.4}
    done = (degrade(grey(0.0, 33), "fading", 0, **plain).image + 1) / 2
    # 0.5^2 = 0.25; halfway to 0.65 is 0.45; the corner loses 40 %, the middle of an edge half of that.
    for (row, column), expected in {(16, 16): 0.45, (0, 32): 0.27, (16, 0): 0.36}.items():
        torch.testing.assert_close(done[:, row, column], torch.full((3,), expected), atol=1e-5, rtol=0)
    toned = (degrade(grey(0.0, 33), "fading", 0, **{**plain, "sepia": 1.0}).image + 1) / 2
    torch.testing.assert_close(toned[:, 16, 16], torch.tensor([0.45, 0.396, 0.315]), atol=1e-5, rtol=0)


def test_fading_with_neutral_levels_changes_nothing(face: Tensor) -> None:
    done = degrade(face, "fading", 0, gamma=1, contrast_loss=0, sepia=0, vignette=0)
    torch.testing.assert_close(done.image, face, atol=1e-6, rtol=0)


def test_the_chain_contains_its_parts(face: Tensor) -> None:
    nothing = {"blur": 0, "factor": 1, "noise": 0}
    jpeg = degrade(face, "jpeg", 0, quality=40).image
    chain = degrade(face, "blind", 0, **nothing, quality=40).image
    torch.testing.assert_close(chain, jpeg, atol=1e-5, rtol=0)
    small = degrade(grey(0.0), "old_photo", 0, blur=0, factor=4, noise=20, quality=100).image
    # Noise enters the small picture: enlarged four times, it is alike in neighbouring pixels.
    assert torch.corrcoef(torch.stack([small[:, :, 1:].flatten(), small[:, :, :-1].flatten()]))[0, 1] > 0.8


@pytest.mark.parametrize(
    ("size", "blur", "factor"), [(64, (1 / 8, 15 / 8), (1, 30 / 8)), (16, (1 / 32, 15 / 32), (1, 1))]
)
def test_blind_ranges_scale_with_the_picture(size: int, blur: tuple[float, float], factor: tuple[float, float]) -> None:
    levels = [degrade(grey(0.0, size), "blind", seed).parameters for seed in range(150)]
    ranges = {"blur": blur, "factor": factor, "noise": (0, 20), "quality": (30, 80)}
    for name, (low, high) in ranges.items():
        drawn = [level[name] for level in levels]
        margin = 0.06 * (high - low) + 1e-3  # 150 uniform draws leave such a gap at an end once in 10,000
        assert low - 1e-3 <= min(drawn) <= low + margin
        assert high - margin <= max(drawn) <= high + 1e-3


def test_blind_ranges_do_not_grow_beyond_512_px() -> None:
    drawn = [degrade(grey(0.0, size), "blind", 5).parameters for size in (512, 700)]
    assert drawn[0] == drawn[1]


# Seeds, replay, sizes


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_picture_and_exact_replay_from_json(face: Tensor, kind: str) -> None:
    first = degrade(face, kind, 7)
    assert torch.equal(first.image, degrade(face, kind, 7).image)
    recorded = json.loads(json.dumps(first.parameters))
    assert set(recorded) == set(KINDS[kind].parameters)
    again = degrade(face, first.kind, first.seed, **recorded)
    assert torch.equal(first.image, again.image)
    assert again.parameters == first.parameters
    other = degrade(face, kind, 8).image
    assert torch.equal(first.image, other) == (kind not in DRAWS_NOISE)


def test_giving_a_drawn_level_leaves_the_other_draws_alone(face: Tensor) -> None:
    drawn = degrade(face, "blind", 1).parameters
    given = degrade(face, "blind", 1, factor=2).parameters
    assert given == {**drawn, "factor": 2}


def test_global_random_state_is_neither_used_nor_moved(face: Tensor) -> None:
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    for kind in KINDS:
        degrade(face, kind, 0)
    assert (np.random.get_state()[1] == states[0]).all()
    assert torch.equal(torch.get_rng_state(), states[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (17, 33), (64, 64), (300, 40)])
def test_any_size_comes_back_as_it_was(kind: str, size: tuple[int, int]) -> None:
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = image.clone()
    done = degrade(image, kind, 0)
    assert done.image.shape == image.shape
    assert done.image.dtype == torch.float32
    assert done.image.abs().max() <= 1
    assert torch.equal(image, before)
    if size == (64, 64):
        assert not torch.equal(done.image, image)


# Errors


def test_errors_list_what_would_be_valid(face: Tensor) -> None:
    with pytest.raises(UserError, match=r"'blurr'.*low_resolution.*old_photo"):
        degrade(face, "blurr", 0)
    with pytest.raises(UserError, match=r"'sigm'.*contrast_loss, sepia"):
        degrade(face, "fading", 0, sigm=1)
    with pytest.raises(UserError, match=r"quality must lie in 1\.\.100"):
        degrade(face, "jpeg", 0, quality=0)
    with pytest.raises(UserError, match="sigma must lie in"):
        degrade(face, "gaussian_blur", 0, sigma=math.nan)
    with pytest.raises(UserError, match="must be a number"):
        degrade(face, "gaussian_blur", 0, sigma="2")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="seed"):
        degrade(face, "jpeg", -1)
    with pytest.raises(UserError, match=r"\(3,H,W\)"):
        degrade(face[:1], "jpeg", 0)
    with pytest.raises(UserError, match=r"\[-1,1\]"):
        degrade(face * 255, "jpeg", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_documented_and_defaults_lie_within_limits(kind: str) -> None:
    assert KINDS[kind].about.endswith(".")
    for parameter in KINDS[kind].parameters.values():
        ends = parameter.default if isinstance(parameter.default, tuple) else (parameter.default,)
        assert all(parameter.low <= end <= parameter.high for end in ends)
        assert parameter.unit
        assert parameter.about
