"""The precision in which a network computes: float32, or bfloat16 with float32 weights."""

from typing import Literal

import torch
from torch import Tensor

from rgcp_core.loss import Model

Precision = Literal["float32", "bfloat16"]


def at_precision(model: Model, precision: Precision) -> Model:
    """``model`` computing in ``precision``; pictures, weights, gradients of weights and the sampler stay float32.

    Under bfloat16 the matrix products and convolutions round to 8 significant bits and the norms stay float32. Every
    call enters autocast anew, because autocast keeps its rounded copies of the weights until it is left: around a
    whole fine-tuning, the network would go on computing with the weights of the first step.
    """
    if precision == "float32":
        return model

    def rounded(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x_t.device.type, dtype=torch.bfloat16):
            return model(x_t, t)

    return rounded


def has_bfloat16(device: torch.device | str) -> bool:
    """Whether the device computes in bfloat16 by itself; one that does not is slower with it than with float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
