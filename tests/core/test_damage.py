"""Damage with a known answer, on pictures whose law of detail is known, and on real photographs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from scipy.ndimage import gaussian_filter
from torch import Tensor

from rgcp_core.benchmark import Crops
from rgcp_core.damage import (
    Damage,
    DetailLaw,
    energy_by_octave,
    estimate_damage,
    measure_detail,
    octave_counts,
    pick_noise_step,
)
from rgcp_core.degrade import degrade
from rgcp_core.demo_faces import write_demo_faces
from rgcp_core.errors import UserError
from rgcp_core.prior import Prior, find_prior, read_card
from rgcp_core.settings import load_settings
from rgcp_core.theory import equal_snr_step

SIZE = 64
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
LEAST = equal_snr_step(ALPHAS_CUMPROD, 100, 256, SIZE)
USUAL = 106


def frequencies(size: int) -> np.ndarray:
    return np.hypot(np.arange(size)[:, None], np.arange(size)[None, :])


def picture(seed: int, size: int = SIZE) -> Tensor:
    """Random amplitudes that fall with the frequency, and a contrast of its own: the law of natural pictures."""
    rng = np.random.default_rng(seed)
    amplitude = rng.lognormal(0, 0.4) / np.maximum(frequencies(size), 1) ** 1.5
    amplitude[0, 0] = 0
    return torch.from_numpy(idctn(3 * amplitude * rng.normal(size=(3, size, size)), axes=(1, 2), norm="ortho")).float()


def without_octaves(y: Tensor, first: int) -> tuple[Tensor, float]:
    """The picture without its octaves from ``first`` on, and the energy that is gone, a value."""
    spectrum = dctn(y.double().numpy(), axes=(1, 2), norm="ortho")
    gone = frequencies(y.shape[-1]) >= 2**first
    rest = idctn(np.where(gone, 0, spectrum), axes=(1, 2), norm="ortho")
    return torch.from_numpy(rest).float(), float((spectrum[:, gone] ** 2).sum() / spectrum.size)


@pytest.fixture(scope="module")
def law() -> DetailLaw:
    return measure_detail(picture(i).clamp(-1, 1) for i in range(100))


def test_octaves_hold_all_energy_and_separate_frequencies() -> None:
    """A cosine of the transform at 4 to 7 half-periods a side lies in the third octave (1, 2-3, 4-7, ...)."""
    column = torch.arange(SIZE, dtype=torch.float64) + 0.5
    wave = torch.cos(torch.pi * 5 * column / SIZE).expand(3, SIZE, SIZE)
    energy = energy_by_octave(wave)
    assert energy.sum() == pytest.approx(float(wave.square().sum()))
    assert energy[2] == pytest.approx(float(wave.square().sum()))
    assert octave_counts(SIZE, SIZE).sum() == 3 * SIZE * SIZE


def test_most_clean_pictures_show_no_damage(law: DetailLaw) -> None:
    found = [estimate_damage(picture(i), law) for i in range(1000, 1050)]
    assert sum(damage == Damage(0, 0) for damage in found) >= 42  # of 50: 3 octaves, each unusual in one of 20
    assert sum(pick_noise_step(picture(i), law, ALPHAS_CUMPROD, USUAL) == LEAST for i in range(1000, 1050)) >= 42


@pytest.mark.parametrize("first", [4, 5])
def test_missing_detail_is_its_energy(law: DetailLaw, first: int) -> None:
    """What a picture had is known here; from what is left of it, it can be told to the width of the law."""
    ratios = []
    for i in range(2000, 2020):
        damaged, gone = without_octaves(picture(i), first)
        ratios.append(estimate_damage(damaged, law).missing / gone)
    assert np.median(ratios) == pytest.approx(1, rel=0.1)
    assert min(ratios) > 0.5
    assert max(ratios) < 3


@pytest.mark.parametrize("sigma", [0.1, 0.3])
def test_noise_is_its_variance(law: DetailLaw, sigma: float) -> None:
    for i in range(3000, 3010):
        noise = sigma * torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(i))
        damage = estimate_damage(picture(i) + noise, law)
        assert damage.noise == pytest.approx(sigma**2, rel=0.1)
        assert damage.missing == 0


def test_the_step_grows_with_blur_and_with_noise(law: DetailLaw) -> None:
    y = picture(4000)
    noise = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    noisy = [y + level * noise for level in (0, 0.03, 0.1, 0.2, 0.4, 1)]
    blurred = [torch.from_numpy(gaussian_filter(y.numpy(), (0, s, s))) for s in (0.01, 0.5, 0.8, 1.2, 2, 3)]
    for series in (noisy, blurred):
        steps = [pick_noise_step(each, law, ALPHAS_CUMPROD, USUAL) for each in series]
        assert steps == sorted(steps)
        assert steps[0] == LEAST
        assert steps[-1] == USUAL


def test_noise_is_answered_by_the_step_that_has_as_much(law: DetailLaw) -> None:
    """By hand: x_t / sqrt(abar) has noise of variance (1 - abar) / abar."""
    variance = 0.12**2
    expected = next(k for k in range(1, 1001) if (1 - ALPHAS_CUMPROD[k - 1]) / ALPHAS_CUMPROD[k - 1] >= variance)
    assert LEAST < expected < USUAL
    noise = 0.12 * torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    found = pick_noise_step(picture(5000) + noise, law, ALPHAS_CUMPROD, USUAL)
    assert found == pytest.approx(expected, abs=2)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_missing_detail_is_answered_by_eq_3(law: DetailLaw, share: float) -> None:
    """SNR(K) times the damage stays what it is at the usual K for the damage that this one is meant for."""
    damaged, _ = without_octaves(picture(6000), 5)
    stated = law.model_copy(update={"missing": estimate_damage(damaged, law).missing / share})
    abar = ALPHAS_CUMPROD[USUAL - 1]
    allowed = abar / (1 - abar) / share  # of the SNR: abar = SNR / (1 + SNR)
    expected = next(k for k in range(1, 1001) if ALPHAS_CUMPROD[k - 1] <= allowed / (1 + allowed) + 1e-12)
    assert pick_noise_step(damaged, stated, ALPHAS_CUMPROD, USUAL) == pytest.approx(expected, abs=1)


def test_half_of_the_damage_it_is_meant_for_gets_the_usual_step(law: DetailLaw) -> None:
    damaged = [degrade(picture(i).clamp(-1, 1), "blind", 7000 + i).image for i in range(7000, 7040)]
    usual = sum(pick_noise_step(y, law, ALPHAS_CUMPROD, USUAL) == USUAL for y in damaged)
    assert 10 <= usual <= 30  # of 40


def test_a_flat_picture_is_damaged_and_no_fault(law: DetailLaw) -> None:
    assert LEAST <= pick_noise_step(torch.zeros(3, SIZE, SIZE), law, ALPHAS_CUMPROD, USUAL) <= USUAL


def test_the_law_needs_enough_pictures_of_the_right_size(law: DetailLaw) -> None:
    with pytest.raises(UserError, match="got 3 of"):
        measure_detail(picture(i) for i in range(3))
    with pytest.raises(UserError, match="16 px or more"):
        measure_detail(picture(i, 8) for i in range(30))
    with pytest.raises(UserError, match="for pictures of 64 px"):
        estimate_damage(picture(0, 128), law)


def test_a_prior_that_does_not_know_clean_detail_picks_nothing(tiny_prior: Prior) -> None:
    card = tiny_prior.card.model_copy(update={"detail": None})
    assert load_settings("fast", tiny_prior.card).restore.noise_step == "auto"
    assert load_settings("fast", card).restore.noise_step == card.usual_noise_step
    with pytest.raises(UserError, match="rgcp prior evaluate tiny --heldout"):
        load_settings("fast", card, {"restore": {"noise_step": "auto"}})
    with pytest.raises(UserError, match="does not know"):
        replace(tiny_prior, card=card).noise_step_for("auto", torch.zeros(3, 16, 16))
    assert tiny_prior.noise_step_for(7, torch.zeros(3, 16, 16)) == 7


def test_the_bundled_prior_tells_good_photographs_from_bad_ones(tmp_path: Path) -> None:
    """On the public-domain portraits, of which the law knows nothing."""
    card = read_card(find_prior("faces64"))
    assert load_settings("balanced", card).restore.noise_step == "auto"
    assert load_settings("paper", card).restore.noise_step == card.usual_noise_step
    assert card.detail is not None
    write_demo_faces(tmp_path, 2, source="public")
    crops = Crops(card.image_size, card.crop_window, "window")
    abar = card.schedule.build().alphas_cumprod
    for path in sorted(tmp_path.glob("*.png")):
        clean = crops.load(path)
        assert pick_noise_step(clean, card.detail, abar, card.usual_noise_step) == LEAST
        for kind, level in (("gaussian_blur", {"sigma": 2.0}), ("old_photo", {}), ("low_resolution", {"factor": 4.0})):
            y = degrade(clean, kind, 0, **level).image
            assert pick_noise_step(y, card.detail, abar, card.usual_noise_step) == card.usual_noise_step
