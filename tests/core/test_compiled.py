"""What compiling and a GPU would have to keep to: no recompilation from face to face, and the CPU's pictures."""

import copy

import pytest
import torch
from torch import Tensor

from rgcp_core.constrain import constrain_prior
from rgcp_core.prior import Prior
from rgcp_core.randomness import stream
from rgcp_core.sampling import generate_album, restore
from rgcp_core.unet import UNet, UNetConfig


def test_copies_of_a_network_share_its_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """It belongs to the class: the copy that is fine-tuned for each face finds what the first face compiled."""
    config = UNetConfig(image_size=8, model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=())
    network = UNet(config.model_copy(update={"num_head_channels": 32})).eval().requires_grad_(False)
    torch.nn.init.normal_(network.out[2].weight)
    x, t = torch.rand(2, 3, 8, 8), torch.tensor([3, 500])
    counters = torch._dynamo.utils.counters["stats"]
    plain = network(x, t)
    monkeypatch.setattr(UNet, "forward", torch.compile(UNet.forward, backend="eager", dynamic=False))

    def one_face() -> int:
        with torch.no_grad():
            assert torch.allclose(network(x, t), plain, atol=1e-5)
        copied = copy.deepcopy(network).train().requires_grad_(True)
        for _ in range(2):
            copied(x, t).sum().backward()
        return int(counters["unique_graphs"])

    start = counters["unique_graphs"]
    compiled = one_face()
    assert compiled > start
    assert one_face() == compiled


def whole_face(prior: Prior, unit: str, device: str = "cpu") -> Tensor:
    """Restore one made-up face (3,H,W) with a few steps of everything."""
    prior = Prior.from_state_dict(prior.network.state_dict(), prior.card, device)
    y = (torch.rand(3, 16, 16, generator=stream(0, unit, "y")) * 2 - 1).to(device)
    album = generate_album(
        prior.network,
        y,
        prior.schedule,
        noise_step=300,
        guidance_interval=150,
        guidance_scale=0.3,
        steps=4,
        generators=[stream(0, unit, f"album:{i}") for i in range(4)],
    )
    constrained = constrain_prior(prior, album, iterations=2, batch_size=4, learning_rate=1e-4, seed=0, unit=unit).prior
    generators = [stream(0, unit, "restore")]
    return restore(constrained.network, y[None], prior.schedule, noise_step=3, generators=generators)[0].cpu()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_restores_the_picture_of_the_cpu(tiny_prior: Prior, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected = whole_face(tiny_prior, "a")
    assert float((whole_face(tiny_prior, "a", "cuda") - expected).abs().max()) < 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_loops_never_wait_for_the_device(tiny_prior: Prior) -> None:
    """From the first step to the last one of each loop; PyTorch raises at every synchronisation."""
    prior = Prior.from_state_dict(tiny_prior.network.state_dict(), tiny_prior.card, "cuda")
    y = torch.zeros(1, 3, 16, 16, device="cuda")

    def watch(done: int, steps: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if done < steps else "default")

    try:
        restore(prior.network, y, prior.schedule, noise_step=5, generators=[stream(0, "a", "r")], on_step=watch)
        constrain_prior(prior, y, iterations=4, batch_size=2, learning_rate=1e-4, seed=0, unit="a", on_step=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
