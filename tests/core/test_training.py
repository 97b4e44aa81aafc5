"""Training a prior, its data, its held-out error and the check for memorised pictures."""

import io
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from rgcp_core import training_data
from rgcp_core.errors import UserError
from rgcp_core.evaluation import heldout_errors
from rgcp_core.memorisation import nearest_training, without_copies
from rgcp_core.prior import Prior
from rgcp_core.schedule import Schedule
from rgcp_core.training import CONFIGS, TrainingConfig, TrainingPlan, _State, _update_ema, train
from rgcp_core.training_data import Pictures, load_pictures
from rgcp_core.unet import UNet, UNetConfig

ROOT = Path(__file__).parents[2]
ARCHITECTURE = UNetConfig(
    image_size=8,
    model_channels=32,
    channel_mult=(1, 1),
    num_res_blocks=1,
    attention_resolutions=(),
    num_head_channels=32,
    dropout=0.2,
)
CONFIG = TrainingConfig(architecture=ARCHITECTURE, batch_size=4, iterations=8, learning_rate=1e-3, warmup_iterations=3)


def pictures(count: int = 12, size: int = 8, seed: int = 0) -> Pictures:
    pixels = torch.randint(256, (count, size, size, 3), generator=torch.Generator().manual_seed(seed))
    return Pictures("noise", [b""] * count, size, pixels.to(torch.uint8))


def plan(folder: Path, **changes: object) -> TrainingPlan:
    return replace(TrainingPlan(folder, "tiny", "for tests", report_steps=1, grid=0), **changes)  # type: ignore[arg-type]


def losses(folder: Path) -> list[list[float]]:
    return json.loads((folder / "history.json").read_text())["losses"]


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "state.pt", weights_only=True)


KILLED = """if True:
    import sys, time, torch
    from pathlib import Path
    from tests.core.test_training import CONFIG, pictures, plan
    from rgcp_core.training import train
    torch.set_num_threads(1)
    def on_progress(progress):
        if progress.step == 6:
            print("six", flush=True)
            time.sleep(600)
    train(CONFIG, pictures(), plan(Path(sys.argv[1]), checkpoint_steps=4), on_progress=on_progress)
"""


def test_a_killed_and_resumed_training_ends_bit_identical(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(CONFIG, pictures(), plan(whole))

    command = [sys.executable, "-c", KILLED, str(killed)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "six\n"
        os.killpg(process.pid, signal.SIGKILL)
    assert weights(killed)["step"] == 4  # steps 5 and 6 were lost
    train(CONFIG, pictures(), plan(killed))

    assert losses(killed) == losses(whole)
    one, other = weights(whole), weights(killed)
    for part in ("network", "ema"):
        assert all(torch.equal(one[part][key], other[part][key]) for key in one[part])
    assert Prior.load(killed / "prior").card.sha256 == Prior.load(whole / "prior").card.sha256


def test_a_fresh_network_errs_by_the_variance_of_the_noise(tmp_path: Path) -> None:
    """Its last layer is zero, so the first loss is the mean square of standard normal noise: 1."""
    config = CONFIG.model_copy(update={"batch_size": 32, "iterations": 30, "learning_rate": 2e-3})
    train(config, pictures(4), plan(tmp_path))
    curve = [loss for _, loss in losses(tmp_path)]
    deviation = math.sqrt(2 / (32 * 3 * 8 * 8))
    assert abs(curve[0] - 1) < 5 * deviation
    assert sum(curve[-10:]) / 10 < 0.5


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"architecture": ARCHITECTURE.model_copy(update={"dropout": 0.0})})
    train(config, pictures(), plan(tmp_path / "one"))
    train(config, pictures(), plan(tmp_path / "two", micro_batch_size=3))
    one, two = weights(tmp_path / "one")["network"], weights(tmp_path / "two")["network"]
    torch.testing.assert_close(two, one, rtol=0, atol=5e-4)  # Adam moves a weight by up to 0.001 a step
    assert [loss for _, loss in losses(tmp_path / "two")] == pytest.approx(
        [loss for _, loss in losses(tmp_path / "one")], rel=1e-4
    )


def test_the_average_forgets_half_in_its_half_life() -> None:
    config = CONFIG.model_copy(update={"ema_halflife": 20.0, "ema_rampup": 1e9})  # 20 samples are 5 steps of 4
    network, average = UNet(ARCHITECTURE), UNet(ARCHITECTURE).requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.ones_(parameter)
    for parameter in average.parameters():
        torch.nn.init.zeros_(parameter)
    state = _State(network, average, torch.optim.Adam(network.parameters()))
    for step in range(1, 6):
        state.step = step
        _update_ema(config, state)
    assert all(torch.allclose(p, torch.full_like(p, 0.5)) for p in average.parameters())


def test_training_can_start_from_a_prior(tmp_path: Path) -> None:
    train(CONFIG, pictures(), plan(tmp_path / "first"))
    first = Prior.load(tmp_path / "first" / "prior")
    still = CONFIG.model_copy(update={"learning_rate": 1e-12, "iterations": 1})
    card = train(still, pictures(), plan(tmp_path / "second"), start_from=first)
    second = Prior.load(tmp_path / "second" / "prior")
    assert all(torch.equal(first.network.state_dict()[k], v) for k, v in second.network.state_dict().items())
    assert card.training["started_from"]["sha256"] == first.card.sha256
    assert card.training["samples_seen"] == 4
    other = CONFIG.model_copy(update={"architecture": ARCHITECTURE.model_copy(update={"num_res_blocks": 2})})
    with pytest.raises(UserError, match="another network"):
        train(other, pictures(), plan(tmp_path / "third"), start_from=first)


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    train(CONFIG, pictures(), plan(tmp_path))
    with pytest.raises(UserError, match="learning_rate"):
        train(CONFIG.model_copy(update={"learning_rate": 2e-3}), pictures(), plan(tmp_path))
    longer = CONFIG.model_copy(update={"iterations": 10})
    assert train(longer, pictures(), plan(tmp_path)).training["iterations"] == 10


def test_a_diverged_training_keeps_its_checkpoint(tmp_path: Path) -> None:
    wild = CONFIG.model_copy(update={"learning_rate": 1e20, "warmup_iterations": 0})
    with pytest.raises(UserError, match="diverged"):
        train(wild, pictures(), plan(tmp_path, checkpoint_steps=1))
    saved = weights(tmp_path)
    assert all(value.isfinite().all() for part in ("network", "ema") for value in saved[part].values())


def test_pictures_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="16 px"):
        train(CONFIG, pictures(size=16), plan(tmp_path))


def test_configurations_are_the_papers() -> None:
    """Parameter count of the 256 px network: 131.7 M with two residual blocks a level."""

    def millions(name: str) -> float:
        with torch.device("meta"):
            return sum(p.numel() for p in UNet(CONFIGS[name].architecture).parameters()) / 1e6

    assert millions("paper-256") == pytest.approx(131.7, abs=0.05)
    assert CONFIGS["paper-512"].batch_size * CONFIGS["paper-512"].iterations == 32 * 2_320_000
    assert [CONFIGS[name].iterations for name in ("afhq-dog-256", "afhq-cat-256")] == [50_000, 100_000]
    for name in ("faces64", "faces128"):
        assert 2 * millions(name) <= 40, "the bundled priors are to have at most 40 MB in float16"


# --------------------------------------------------------------------------------------------------------- data


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pngs() -> list[bytes]:
    rng = np.random.default_rng(0)
    return [encoded(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)) for _ in range(5)]


def test_folder_parquet_and_lazy_reading_agree(
    pngs: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for i, png in enumerate(pngs):
        (tmp_path / "folder" / ("deep" if i > 2 else "") / f"{'z' * (i > 2)}{i}.png").write_bytes(png)
    pd.DataFrame({"image": pngs}).to_parquet(tmp_path / "p.parquet")
    parquet = load_pictures(tmp_path / "p.parquet", 8)
    rows = torch.tensor([4, 0, 2])
    exact = np.stack([np.asarray(Image.open(io.BytesIO(pngs[i]))) for i in rows])
    expected = torch.from_numpy(exact).permute(0, 3, 1, 2).double() / 127.5 - 1
    torch.testing.assert_close(parquet[rows].double(), expected, atol=1e-6, rtol=0)

    def as_set(found: Pictures) -> set[bytes]:
        return {picture.numpy().tobytes() for batch in found.batches(2) for picture in batch}

    assert as_set(load_pictures(tmp_path / "folder", 8)) == as_set(parquet)
    monkeypatch.setattr(training_data, "IN_MEMORY_BYTES", 0)
    lazy = load_pictures(tmp_path / "p.parquet", 8)
    assert lazy.decoded is None
    assert torch.equal(lazy[rows], parquet[rows])


def test_a_larger_picture_is_cropped_centrally_and_antialiased(tmp_path: Path) -> None:
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:48] = np.indices((32, 32)).sum(0)[..., None] % 2 * 255  # checkerboard: its mean is grey
    (tmp_path / "a.png").write_bytes(encoded(wide))
    picture = load_pictures(tmp_path, 8)[torch.tensor([0])]
    assert picture.shape == (1, 3, 8, 8)
    assert float(picture[..., 2:6, 2:6].abs().max()) < 0.05


@pytest.mark.parametrize("bad", ["missing", "empty", "column", "broken"])
def test_unusable_data_is_a_user_error(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    if bad == "empty":
        path.mkdir()
    elif bad != "missing":
        path = tmp_path / "data.parquet"
        pd.DataFrame({"picture" if bad == "column" else "image": [b"no picture"]}).to_parquet(path)
    with pytest.raises(UserError):
        load_pictures(path, 8)


# -------------------------------------------------------------------------------------- evaluation, memorisation


def test_heldout_error_of_known_models() -> None:
    """A model that knows the picture errs by 0, one that answers zero by E[eps^2] = 1, at every time."""
    schedule, one = Schedule.linear(), pictures(1)
    x_0 = one[torch.tensor([0])]

    def oracle(x_t: Tensor, t: Tensor) -> Tensor:
        abar = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        return ((x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()).float()

    assert all(error < 1e-9 for error in heldout_errors(oracle, one, schedule).values())
    many = pictures(200)
    errors = heldout_errors(lambda x_t, t: torch.zeros_like(x_t), many, schedule, batch_size=64)
    assert all(abs(error - 1) < 5 * math.sqrt(2 / (200 * 192)) for error in errors.values())
    again = heldout_errors(lambda x_t, t: torch.zeros_like(x_t), many, schedule, batch_size=7)
    assert again == pytest.approx(errors, rel=1e-5)


def test_copies_and_mirrored_copies_are_found() -> None:
    training, fresh = pictures(120), pictures(6, seed=1)
    shown = training[torch.tensor([7, 30])]
    candidates = torch.cat([shown[:1], shown[1:].flip(-1), fresh[torch.arange(6)]])
    found = nearest_training(candidates, training)
    assert found.row[:2].tolist() == [7, 30]
    assert found.copies.tolist() == [True, True] + [False] * 6
    # Independent noise, uniform on [-1,1]: the expected squared difference of two pixels is 2/3.
    assert float(found.distance[2:].max()) < math.sqrt(2 / 3)
    assert float(found.ratio[2:].min()) > 0.8


def test_heldout_duplicates_of_training_pictures_are_left_out() -> None:
    training, fresh = pictures(120), pictures(6, seed=1)
    assert training.decoded is not None
    assert fresh.decoded is not None
    mixed = replace(fresh, encoded=[b""] * 7, decoded=torch.cat([fresh.decoded, training.decoded[9:10]]))
    assert torch.equal(without_copies(mixed, training).decoded, fresh.decoded)
