"""What all tests share: a tiny prior, public-domain photographs and one Prefect server a session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from prefect.testing.utilities import prefect_test_harness

from rgcp_core.damage import measure_detail
from rgcp_core.prior import Card, Prior, ScheduleConfig
from rgcp_core.unet import UNet, UNetConfig

SHARED = Path(__file__).parents[2] / "shared"
TINY = UNetConfig(
    image_size=16,
    model_channels=32,
    channel_mult=(1, 1),
    num_res_blocks=1,
    attention_resolutions=(8,),
    num_head_channels=32,
    dropout=0.0,
)

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
torch.set_num_threads(1)  # tiny networks gain nothing from more


@pytest.fixture(scope="session")
def tiny_prior() -> Prior:
    """A network of 16 px with random weights: it restores nothing, but all the code runs in milliseconds."""
    torch.manual_seed(0)
    network = UNet(TINY)
    for parameter in network.parameters():  # the layers that start at zero would hide mistakes
        if parameter.abs().sum() == 0:
            torch.nn.init.normal_(parameter, std=0.02)
    coarse, fine = (0.3 * torch.randn(40, 3, size, size) for size in (4, 16))
    smooth = torch.nn.functional.interpolate(coarse, 16, mode="bicubic") + 0.1 * fine
    card = Card(
        name="tiny",
        architecture=TINY,
        schedule=ScheduleConfig(),
        crop_window=(0.195, 0.285, 0.835, 0.925),
        detail=measure_detail(smooth.clamp(-1, 1)),
        sha256="",
        licence="none",
        source="random weights for tests",
    )
    return Prior.from_state_dict(network.state_dict(), card)


@pytest.fixture(scope="session")
def tiny_prior_dir(tiny_prior: Prior, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same prior as a folder."""
    folder = tmp_path_factory.mktemp("priors") / "tiny"
    tiny_prior.save(folder)
    return folder


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Prefect API that lives as long as the session."""
    from prefect.settings import PREFECT_API_URL

    with prefect_test_harness(server_startup_timeout=180):
        yield str(PREFECT_API_URL.value())


@pytest.fixture(scope="session")
def astronaut() -> torch.Tensor:
    """NASA's portrait of Eileen Collins (public domain), (512,512,3) uint8."""
    from skimage.data import astronaut

    return astronaut()
