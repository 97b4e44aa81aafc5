"""How a network computes: in which precision, and as it is written or compiled."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from rgcp_core.errors import UserError
from rgcp_core.loss import Model
from rgcp_core.unet import UNet

Precision = Literal["float32", "tf32", "bfloat16"]


@contextmanager
def computing(model: Model, precision: Precision, compiled: bool = False) -> Iterator[Model]:
    """``model`` computing in ``precision`` within the block, backward passes too, compiled or as it is written.

    Pictures, weights, gradients of weights and the sampler are float32 in any case.

    ==========  ==============================  ======================================================
    precision   mantissa of factors, bits       on
    ==========  ==============================  ======================================================
    float32     23                              every device
    tf32        10, of convolutions too         NVIDIA from Ampere on; elsewhere the same as float32
    bfloat16    7; norms stay float32           every device, but slowly without units for it
    ==========  ==============================  ======================================================

    PyTorch allows TF32 process-wide and by itself does so for convolutions, so that a "float32" run on a GPU is none:
    here it is what was asked for, and what was set before holds again after the block.

    Args:
        model: noise predictor; compiled, a `UNet`.
        precision: see above.
        compiled: compile it at its first call with inputs of a shape, or with other parts trained: a minute each. All
            networks of one architecture share the code. On CUDA it is replayed as a graph, which belongs to the
            addresses of the weights: see ``into`` of `constrain_prior`. An output holds until the next call. Sums are
            rounded otherwise, and dropout draws other masks, from the same seed always the same.

    Raises:
        UserError: to be compiled, and no compiler is here.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    try:
        model = _as_compiled(model) if compiled else model
        yield _in_bfloat16(model) if precision == "bfloat16" else model
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def _in_bfloat16(model: Model) -> Model:
    """``model`` under autocast.

    Every call enters it anew, because autocast keeps its rounded copies of the weights until it is left: around a whole
    fine-tuning, the network would go on computing with the weights of the first step.
    """

    def rounded(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x_t.device.type, dtype=torch.bfloat16):
            return model(x_t, t)

    return rounded


def _as_compiled(model: Model) -> Model:
    """The compiled forward pass of the network's class, for this network."""
    if not isinstance(model, UNet):
        raise UserError(f"Only a network of the class UNet can be compiled; got {type(model).__name__}.")
    device = next(model.parameters()).device
    check_compiler(device)
    forward = partial(_compiled_forward(device.type == "cuda"), model)

    def called(x_t: Tensor, t: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # earlier outputs are done with; does nothing without graphs
        return forward(x_t, t)

    return called


@cache
def _compiled_forward(cuda_graphs: bool) -> Callable[[UNet, Tensor, Tensor], Tensor]:
    # Album, guided step, fine-tuning and restoration, each for the batch sizes that occur: more than the 8 by default.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(UNet.forward, dynamic=False, mode="reduce-overhead" if cuda_graphs else "default")


def check_compiler(device: torch.device) -> None:
    """Raise a `UserError` where what compiles for ``device`` is missing."""
    if not any(shutil.which(name) for name in ("cc", "gcc", "g++", "clang")):
        raise UserError(
            "compiled=true needs a C++ compiler (g++ or clang), and none is here: install one, or leave it out."
        )
    if device.type == "cuda" and find_spec("triton") is None:
        raise UserError("compiled=true needs Triton on a CUDA device: `pip install triton`, or leave it out.")


def computes_natively(device: torch.device | str, precision: Precision) -> bool:
    """Whether the device has units for it; bfloat16 without them is slower than float32, tf32 is float32."""
    device = torch.device(device)
    if precision == "float32":
        return True
    if precision == "tf32":
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
