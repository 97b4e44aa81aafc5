"""The precision in which a network computes, and what compiled code must keep to."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.precision import RoundedProducts, rounded_to_tf32
from rgcp_core import compute
from rgcp_core.compute import Precision, check_compiler, computes_natively, computing
from rgcp_core.constrain import Constrained, constrain_prior
from rgcp_core.errors import UserError
from rgcp_core.loss import denoising_loss
from rgcp_core.prior import Prior
from rgcp_core.randomness import stream
from rgcp_core.sampling import generate_album, restore
from rgcp_core.unet import UNet


def tf32_allowed() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("precision", "allowed"), [("float32", False), ("tf32", True), ("bfloat16", False)])
def test_tf32_is_what_was_asked_for_and_afterwards_what_it_was(precision: Precision, allowed: bool) -> None:
    """PyTorch allows it process-wide: for convolutions by default, for matrix products not."""
    assert tf32_allowed() == (False, True)
    with computing(lambda x, t: x, precision):
        assert tf32_allowed() == (allowed, allowed)
    assert tf32_allowed() == (False, True)
    with pytest.raises(ZeroDivisionError), computing(lambda x, t: x, precision):
        _ = 1 / 0
    assert tf32_allowed() == (False, True)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_fine_tuning_and_its_backward_pass_have_the_precision(
    tiny_prior: Prior, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    forward: list[tuple[bool, bool]] = []
    backward: list[tuple[bool, bool]] = []

    def spy(model: Any, *arguments: Any) -> Any:
        forward.append(tf32_allowed())
        loss = denoising_loss(model, *arguments)
        if loss.total.requires_grad:
            loss.mse.register_hook(lambda grad: backward.append(tf32_allowed()))
        return loss

    monkeypatch.setattr("rgcp_core.constrain.denoising_loss", spy)
    fine_tuned(tiny_prior, torch.zeros(1, 3, 16, 16), "a", precision=precision)
    assert (
        forward[1:-1] == backward == [(precision == "tf32",) * 2] * 2
    )  # the first and the last are looks at the album
    assert tf32_allowed() == (False, True)


def test_bfloat16_rounds_and_tf32_on_a_cpu_is_float32(tiny_prior: Prior) -> None:
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 500])
    with torch.no_grad():
        exact = tiny_prior.network(x, t)
        with computing(tiny_prior.network, "tf32") as model:
            assert torch.equal(model(x, t), exact)
        with computing(tiny_prior.network, "bfloat16") as model:
            rounded = model(x, t)
    assert rounded.dtype == torch.float32
    error = float((rounded - exact).norm() / exact.norm())
    assert 2**-12 < error < 2**-5  # of factors with 8 significant bits, through a dozen layers
    assert not computes_natively("cpu", "tf32")
    assert computes_natively("cpu", "float32")


# ------------------------------------------------------------------------------------------------ TF32 by arithmetic


def test_tf32_rounds_to_ten_bits_of_mantissa() -> None:
    """To nearest, ties away from zero."""
    ulp = 2.0**-10
    values = torch.tensor([1, 1 + ulp / 2, 1 + 0.49 * ulp, -1 - ulp / 2, 3 * 2.0**40, 0, -0.0, float("inf")])
    expected = torch.tensor([1, 1 + ulp, 1, -1 - ulp, 3 * 2.0**40, 0, -0.0, float("inf")])
    assert torch.equal(rounded_to_tf32(values), expected)


def test_products_are_rounded_forward_and_backward() -> None:
    """A factor's relative rounding error is uniform: rms 2^-11 / sqrt(3) at a mantissa of 1, times 0.72 over all."""
    torch.manual_seed(0)
    x, w = torch.randn(4, 32, 16, 16), torch.randn(32, 32, 3, 3)

    def errors_of(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weight = w.to(dtype).requires_grad_()
        y = torch.nn.functional.conv2d(x.to(dtype), weight)
        y.backward(torch.ones_like(y) / 3)
        assert weight.grad is not None
        return y.detach().double(), weight.grad.double()

    exact = errors_of(torch.float64)
    with RoundedProducts():
        rounded = errors_of(torch.float32)
    one_factor = 0.72 * 2**-11 / 3**0.5
    forward, backward = (float((a - b).norm() / b.norm()) for a, b in zip(rounded, exact, strict=True))
    assert forward == pytest.approx(2**0.5 * one_factor, rel=0.1)
    assert 0.5 * one_factor < backward < 2 * one_factor  # the other factor is 1/3, always rounded alike


# ------------------------------------------------------------------------------------------------------ compiled code


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled as far as tracing and differentiating go; generating machine code would take a minute."""
    torch._dynamo.reset()
    forward = torch.compile(UNet.forward, backend="aot_eager", dynamic=False)
    monkeypatch.setattr(compute, "_compiled_forward", lambda cuda_graphs: forward)
    yield
    torch._dynamo.reset()


def fine_tuned(prior: Prior, album: Tensor, unit: str, **options: Any) -> Constrained:
    return constrain_prior(prior, album, iterations=2, batch_size=2, learning_rate=1e-3, seed=0, unit=unit, **options)


def whole_face(prior: Prior, unit: str, *, compiled: bool = False, into: UNet | None = None) -> Tensor:
    """Restore one made-up face (3,H,W) with a few steps of everything."""
    device = next(prior.network.parameters()).device
    y = (torch.rand(3, 16, 16, generator=stream(0, unit, "y")) * 2 - 1).to(device)
    with computing(prior.network, "float32", compiled) as model:
        album = generate_album(
            model,
            y,
            prior.schedule,
            noise_step=300,
            guidance_interval=150,
            guidance_scale=0.3,
            steps=4,
            generators=[stream(0, unit, f"album:{i}") for i in range(4)],
        )
    network = fine_tuned(prior, album, unit, compiled=compiled, into=into).prior.network
    with computing(network, "float32", compiled) as model:
        streams = [stream(0, unit, "restore")]
        return restore(model, y[None], prior.schedule, noise_step=3, generators=streams)[0].cpu()


def test_compiled_code_serves_face_after_face(tiny_prior: Prior, traced: None) -> None:
    """The same pictures as by the code as it is written, and nothing is compiled after the first face."""
    network = copy.deepcopy(tiny_prior.network)
    counters = torch._dynamo.utils.counters["stats"]
    graphs = []
    for unit, into in (("a", network), ("b", network), ("c", None)):  # a copy finds the code too
        start = counters["unique_graphs"]
        restored = whole_face(tiny_prior, unit, compiled=True, into=into)
        graphs.append(counters["unique_graphs"] - start)
        assert torch.allclose(restored, whole_face(tiny_prior, unit), atol=1e-5)
    assert graphs[0] >= 4  # album, guided, fine-tuning, restoration
    assert graphs[1:] == [0, 0]


def test_a_network_that_is_reused_gives_the_weights_of_a_new_one(tiny_prior: Prior) -> None:
    into = copy.deepcopy(tiny_prior.network)
    albums = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for parameters in ("all", "norms", "low_rank", "all"):
        for unit, album in zip("ab", albums, strict=True):
            reused = fine_tuned(tiny_prior, album, unit, into=into, parameters=parameters)
            new = fine_tuned(tiny_prior, album, unit, parameters=parameters)
            assert (reused.prior.network is into) == (parameters != "low_rank")
            assert torch.equal(reused.losses, new.losses)
            for a, b in zip(reused.prior.network.parameters(), new.prior.network.parameters(), strict=True):
                assert torch.equal(a, b)
                assert not a.requires_grad


def test_the_prior_itself_is_not_overwritten(tiny_prior: Prior) -> None:
    shared = Prior.from_state_dict(tiny_prior.network.state_dict(), tiny_prior.card).network
    for into in (tiny_prior.network, shared):
        with pytest.raises(UserError, match="the prior itself"):
            fine_tuned(tiny_prior, torch.zeros(1, 3, 16, 16), "a", into=into)


def test_without_a_compiler_it_says_so(tiny_prior: Prior, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"), computing(tiny_prior.network, "float32", True):
        pass
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(compute, "find_spec", lambda name: None)
    check_compiler(torch.device("cpu"))
    with pytest.raises(UserError, match="needs Triton"):
        check_compiler(torch.device("cuda"))


# ------------------------------------------------------------------------------------------------------------ a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_restores_the_picture_of_the_cpu(tiny_prior: Prior, compiled: bool) -> None:
    prior = Prior.from_state_dict(tiny_prior.network.state_dict(), tiny_prior.card, "cuda")
    into = copy.deepcopy(prior.network)
    addresses = [parameter.data_ptr() for parameter in into.parameters()]
    for unit in ("a", "b"):
        restored = whole_face(prior, unit, compiled=compiled, into=into)
        assert float((restored - whole_face(tiny_prior, unit)).abs().max()) < 1e-3
        assert [parameter.data_ptr() for parameter in into.parameters()] == addresses  # a graph's weights stay there


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
