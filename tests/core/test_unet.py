"""The network and the diffusion against numbers computed by the guided-diffusion implementation.

Weights and pictures come from a formula; `golden/*.safetensors` hold what that code makes of them: the network's
output, the noised picture, the losses, and mean and log-variance of the reverse step.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rgcp_core.errors import UserError
from rgcp_core.loss import denoising_loss
from rgcp_core.schedule import Schedule, learned_log_variance
from rgcp_core.unet import PAPER_512, Norm, UNet, UNetConfig

SCHEDULE = Schedule.linear()
GOLDEN = {
    "updown_legacy": UNetConfig(
        image_size=16, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(8,),
        num_head_channels=16, resblock_updown=True, use_new_attention_order=False, dropout=0.0,
    ),
    "conv_new": UNetConfig(
        image_size=16, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(8,),
        num_head_channels=16, resblock_updown=False, use_new_attention_order=True, dropout=0.0,
    ),
}  # fmt: skip


def formula(shape: Sequence[int], phase: float, scale: float) -> Tensor:
    numbers = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(0.7 * numbers + phase)).float().reshape(*shape)


@pytest.fixture(params=GOLDEN, scope="module")
def golden(request: pytest.FixtureRequest) -> tuple[UNet, dict[str, Tensor]]:
    values = load_file(Path(__file__).parent / "golden" / f"{request.param}.safetensors")
    values |= {"x": formula((3, 3, 16, 16), 0.0, 1.0), "eps": formula((3, 3, 16, 16), 1.0, 1.4)}
    network = UNet(GOLDEN[request.param]).eval().requires_grad_(False)
    state = sorted(network.state_dict().items())
    network.load_state_dict({key: formula(value.shape, i, 0.1) for i, (key, value) in enumerate(state)})
    return network, values | {"t": torch.tensor([0, 150, 700])}


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_forward_is_guided_diffusions(golden: tuple[UNet, dict[str, Tensor]]) -> None:
    network, values = golden
    assert relative_error(network(values["x"], values["t"]), values["output"]) < 1e-5


def test_noise_and_reverse_step_are_guided_diffusions(golden: tuple[UNet, dict[str, Tensor]]) -> None:
    network, values = golden
    t = values["t"][1:]  # at t = 0 no noise is added and the variance does not matter
    x_t = SCHEDULE.q_sample(values["x"], values["t"], values["eps"])
    assert torch.allclose(x_t, values["x_t"], atol=1e-6)
    output = network(x_t[1:], t)
    x0_pred = SCHEDULE.predict_x0(x_t[1:], t, output[:, :3]).clamp(-1, 1)
    posterior = SCHEDULE.posterior(x0_pred, x_t[1:], t, t - 1)
    log_variance = learned_log_variance(output[:, 3:], posterior.log_variance, SCHEDULE.log_beta(t, t - 1, x_t[1:]))
    assert torch.allclose(posterior.mean, values["mean"][1:], atol=1e-5)
    assert torch.allclose(log_variance, values["log_variance"][1:], atol=1e-4)


def test_losses_are_guided_diffusions(golden: tuple[UNet, dict[str, Tensor]]) -> None:
    network, values = golden
    loss = denoising_loss(network, values["x"], values["t"], values["eps"], SCHEDULE)
    assert torch.allclose(loss.mse, values["mse"], rtol=1e-5)
    # At t = 0 guided-diffusion approximates the normal distribution's integral by a tanh; ours is exact.
    assert torch.allclose(loss.vb[1:], values["vb"][1:], rtol=1e-3)
    assert torch.allclose(loss.vb[:1], values["vb"][:1], rtol=0.03)


@pytest.mark.parametrize(
    ("config", "millions"),
    [(UNetConfig(), 131.71), (UNetConfig(num_res_blocks=1), 93.56), (PAPER_512, 557.97)],
    ids=["256 px, two blocks", "256 px, one block", "512 px"],
)
def test_table_1_networks_have_the_known_size(config: UNetConfig, millions: float) -> None:
    with torch.device("meta"):
        network = UNet(config)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions


def test_a_fresh_network_predicts_nothing() -> None:
    network = UNet(GOLDEN["updown_legacy"])
    assert not network(torch.randn(1, 3, 16, 16), torch.tensor([5])).any()


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"num_head_channels \(48\) must divide the 32 channels"):
        UNet(UNetConfig(image_size=16, model_channels=32, channel_mult=(1, 2), num_head_channels=48))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_norms_sum_in_float32_under_bfloat16(layout: torch.memory_format) -> None:
    """Against the formula in float64: the result differs by the rounding of what goes out, not by that of its sums."""
    torch.manual_seed(0)
    norm = Norm(64, UNetConfig())
    torch.nn.init.normal_(norm.weight)
    x = (3 * torch.randn(2, 64, 16, 16) + 50).bfloat16().to(memory_format=layout).requires_grad_()
    towards = torch.randn(2, 64, 16, 16).bfloat16()

    def formula(x: Tensor) -> Tensor:
        groups = x.unflatten(1, (32, 2))
        variance, mean = torch.var_mean(groups, (2, 3, 4), correction=0, keepdim=True)
        return ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2) * norm.weight.double()[:, None, None]

    exact = x.detach().double().requires_grad_()
    formula(exact).backward(towards.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = norm(x)
    result.backward(towards)
    assert exact.grad is not None
    assert x.grad is not None
    assert result.dtype == x.grad.dtype == torch.bfloat16
    half_a_step = 2**-8  # relative
    torch.testing.assert_close(result.double(), formula(exact), rtol=1.01 * half_a_step, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1.01 * half_a_step, atol=1e-4)
