"""``rgcp prior adapt``: an archive in, a prior that can be named out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photos import digests
from PIL import Image
from scipy.ndimage import gaussian_filter

from flows.adapt import adapt, prepare, summary
from flows.archive import archive
from rgcp_core.errors import UserError
from rgcp_core.manifest import read_manifest
from rgcp_core.prior import Prior

QUICK: dict[str, Any] = {"warm_start": {"iterations": 30, "learning_rate": 2e-3}}


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Aligned crops of 32 px: twenty sharp ones that share a shade, twelve blurred, and a file that is no picture."""
    folder, rng = tmp_path_factory.mktemp("archive") / "scans", np.random.default_rng(0)
    (folder / "inner").mkdir(parents=True)
    shade = np.linspace(110, 150, 32)[:, None]
    for i in range(32):
        levels = shade + 25 * np.kron(rng.standard_normal((8, 8)), np.ones((4, 4)))
        if i >= 20:
            levels = gaussian_filter(levels, 4)
        place = folder / ("inner" if i % 2 else "") / f"{i:02d}.png"
        Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(place)
    (folder / "empty.jpg").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def warm(scans: Path, tiny_prior_dir: Path, prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's folder of priors, with one made from the scans."""
    mine, before = tmp_path_factory.mktemp("mine"), digests(scans)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RGCP_PRIORS_DIR", str(mine))
        adapt([str(scans)], "attic", str(tiny_prior_dir), settings=QUICK, framing="window")
    assert digests(scans) == before, "inputs are never changed"
    return mine


def test_the_card_says_what_was_learned_from(warm: Path, tiny_prior_dir: Path) -> None:
    prior, start = Prior.load(warm / "attic"), Prior.load(tiny_prior_dir)
    facts = prior.card.training["warm_start"]
    assert (facts["faces_found"], facts["faces_used"]) == (32, 16)
    assert facts["left_out"] == {"blurred, noisy or faded": 12, "less clean than those taken": 4}
    assert facts["prior_sha256"] == start.card.sha256 != prior.card.sha256
    assert facts["heldout_loss_after"] < facts["heldout_loss_before"]
    assert (prior.card.crop_window, prior.card.licence) == (start.card.crop_window, start.card.licence)
    assert "16 of 32 faces" in summary(prior.card)


def test_an_archive_is_restored_with_its_own_prior(
    warm: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RGCP_PRIORS_DIR", str(warm))
    few = {"album": {"size": 2, "steps": 2}, "constrain": {"iterations": 1}, "faces": {"max_enlargement": 20}}
    archive([str(scans / "00.png")], str(tmp_path), prior="attic", preset="fast", settings=few, framing="window")
    rows = read_manifest(tmp_path)
    assert list(rows.status) == ["restored"]
    assert list(rows.prior) == ["attic"]


def test_the_same_call_makes_the_same_prior(warm: Path, scans: Path, tiny_prior_dir: Path, tmp_path: Path) -> None:
    again = adapt([str(scans)], "attic", str(tiny_prior_dir), settings=QUICK, framing="window", to=str(tmp_path))
    assert again.sha256 == Prior.load(warm / "attic").card.sha256
    fewer = prepare([str(scans)], "few", str(tiny_prior_dir), framing="window", look_at=5, to=str(tmp_path))
    assert fewer.look_at == 5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": "attic"}, "There is a prior 'attic' already"),
        ({"name": "faces64"}, "would be hidden"),
        ({"name": "a/b"}, "Expected a name"),
        ({"framing": "boxes"}, "boxes are for restoring"),
        ({"settings": {"restore": {"steps": 5}}}, r"only faces\.\* and warm_start\.\*"),
        ({"settings": {"warm_start": {"times": "below_noise_step"}}}, "must be all"),
        ({"settings": {"warm_start": {"iterations": -1}}}, "Unusable settings"),
        ({"look_at": 0}, "above 0"),
        ({"most": 7}, "needs 8 of them"),
    ],
)
def test_wrong_calls_say_what_is_wrong(
    warm: Path,
    scans: Path,
    tiny_prior_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    sentence: str,
) -> None:
    monkeypatch.setenv("RGCP_PRIORS_DIR", str(warm))
    arguments: dict[str, Any] = {"name": "other", "prior": str(tiny_prior_dir), "framing": "window"} | change
    call = adapt if "most" in change else prepare
    with pytest.raises(UserError, match=sentence):
        call([str(scans)], **arguments)
    assert not (warm / "other").exists()
