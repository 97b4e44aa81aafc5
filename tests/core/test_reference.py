"""Our fast code against the plain reference of the same algorithm, both given one tape of noise, times and dropout."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import reference
from rgcp_core.constrain import constrain_prior
from rgcp_core.loss import denoising_loss
from rgcp_core.prior import Card, Prior
from rgcp_core.randomness import stream
from rgcp_core.sampling import generate_album, restore
from rgcp_core.schedule import Schedule
from rgcp_core.unet import UNet, UNetConfig

SCHEDULE = Schedule.linear()
DIFFUSION = reference.Diffusion(SCHEDULE.betas)
ARCHITECTURES = {
    "like faces64": UNetConfig(
        image_size=16, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(8,),
        num_head_channels=32, resblock_updown=False, dropout=0.1,
    ),
    "like the paper's": UNetConfig(
        image_size=16, model_channels=32, channel_mult=(1, 2), num_res_blocks=2, attention_resolutions=(16, 8),
        num_head_channels=16, resblock_updown=True, dropout=0.1,
    ),
}  # fmt: skip


@pytest.fixture(params=ARCHITECTURES, scope="module")
def prior(request: pytest.FixtureRequest) -> Prior:
    config = ARCHITECTURES[request.param]
    torch.manual_seed(3)
    network = UNet(config)
    for parameter in network.parameters():  # no layer may be zero, and no norm the identity
        noise = torch.randn_like(parameter)
        parameter.data = 0.1 * noise if parameter.ndim > 1 else parameter.data + 0.05 * noise
    card = Card(name="random", architecture=config, sha256="", licence="none", source="random weights for tests")
    return Prior.from_state_dict(network.state_dict(), card)


@pytest.fixture
def dropout_tape(monkeypatch: pytest.MonkeyPatch) -> torch.Generator:
    """Dropout whose masks come from one generator, whatever the layout of the tensor in memory."""
    tape = torch.Generator()

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training:
            return x
        return x * (torch.rand(x.shape, generator=tape) >= p) / (1 - p)

    monkeypatch.setattr(F, "dropout", dropout)
    return tape


def plain(prior: Prior) -> reference.Network:
    return reference.Network(prior.network.state_dict(), prior.card.architecture)


def pictures(n: int, seed: int = 0) -> Tensor:
    small = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(small, size=16, mode="bilinear") * 2 - 1


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_forward_is_the_references(prior: Prior, layout: torch.memory_format) -> None:
    x, t = pictures(3), torch.tensor([0, 40, 900])
    expected = plain(prior)(x, t)
    network = Prior.from_state_dict(prior.network.state_dict(), prior.card).network.to(memory_format=layout)
    assert relative_error(network(x.to(memory_format=layout), t), expected) < 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_first_gradients_are_the_references(
    prior: Prior, layout: torch.memory_format, dropout_tape: torch.Generator
) -> None:
    x_0, t = pictures(4), torch.tensor([0, 3, 120, 900])
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))

    other = plain(prior)
    other.training = True
    for weight in other.weights.values():
        weight.requires_grad_(True)
    dropout_tape.manual_seed(9)
    total, _ = reference.loss_of(other, DIFFUSION, x_0, t, eps)
    total.mean().backward()

    network = Prior.from_state_dict(prior.network.state_dict(), prior.card).network.to(memory_format=layout)
    network.train().requires_grad_(True)
    dropout_tape.manual_seed(9)
    denoising_loss(network, x_0, t, eps, SCHEDULE).total.mean().backward()
    largest = max(float(weight.grad.norm()) for weight in other.weights.values() if weight.grad is not None)
    for name, parameter in network.named_parameters():
        expected = other.weights[name].grad
        assert expected is not None
        assert parameter.grad is not None
        # A bias in front of a norm of one channel has no gradient but rounding: measured against the largest of all.
        assert float((parameter.grad - expected).norm()) < 1e-4 * max(float(expected.norm()), 1e-3 * largest), name


def test_a_whole_face_is_the_references(prior: Prior, dropout_tape: torch.Generator) -> None:
    """Album, fine-tuning and restoration; the weights are compared by the picture that they restore."""
    y = pictures(1, seed=5)[0]
    album_step, restore_step, interval = 12, 6, 5

    def streams() -> list[torch.Generator]:
        return [stream(0, "face", f"album:{i}") for i in range(2)]

    expected_album = reference.album(
        plain(prior), DIFFUSION, y, noise_step=album_step, interval=interval, scale=0.3, generators=streams()
    )
    album = generate_album(
        prior.network,
        y,
        SCHEDULE,
        noise_step=album_step,
        guidance_interval=interval,
        guidance_scale=0.3,
        generators=streams(),
    )
    assert float((album - expected_album).abs().max()) < 1e-5
    unguided = reference.album(
        plain(prior), DIFFUSION, y, noise_step=album_step, interval=0, scale=0.3, generators=streams()
    )
    assert float((unguided - expected_album).abs().max()) > 1e-2  # or the comparison says nothing of the guidance

    dropout_tape.manual_seed(4)
    tuned = reference.fine_tuned(
        plain(prior),
        DIFFUSION,
        expected_album,
        iterations=3,
        batch_size=4,
        learning_rate=1e-4,
        draws=stream(0, "face", "constrain"),
    )
    dropout_tape.manual_seed(4)
    constrained = constrain_prior(
        prior, expected_album, iterations=3, batch_size=4, learning_rate=1e-4, seed=0, unit="face"
    ).prior

    def ours(prior: Prior) -> Tensor:
        generators = [stream(0, "face", "restore")]
        return restore(prior.network, y[None], SCHEDULE, noise_step=restore_step, generators=generators)

    expected = reference.restored(tuned, DIFFUSION, y, noise_step=restore_step, generator=stream(0, "face", "restore"))
    error = float((ours(constrained) - expected).abs().max())
    moved = float((ours(prior) - expected).abs().max())
    assert error < 1e-5
    assert moved > 1000 * error  # the fine-tuning shows, and is the reference's
