"""A constrained prior kept as its difference to the prior: 8 bits a weight, compressed.

The weights move little while a prior is constrained, so that their differences need few bits: those of a tensor are
stored as whole numbers -127..127 times one scale. A file is 4 to 5 times smaller than float32 weights, and a picture
restored with what is read back differs by rounding: by at most one of 255 levels in what was measured.
"""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from rgcp_core.errors import UserError
from rgcp_core.images import write_atomically
from rgcp_core.prior import Prior

_LEVELS = 127
_SCALE = ".scale"
_PRIOR = "prior_sha256"


def write_delta(constrained: Prior, prior: Prior, path: Path) -> None:
    """Write what ``constrained`` differs by from ``prior``, whole or not at all."""
    before, state = prior.network.state_dict(), {}
    for name, value in constrained.network.state_dict().items():
        delta = (value - before[name]).float().cpu()
        scale = delta.abs().max().clamp_min(1e-30) / _LEVELS
        state[name] = (delta / scale).round().to(torch.int8).contiguous()
        state[name + _SCALE] = scale.reshape(1)
    state[_PRIOR] = torch.frombuffer(bytearray(prior.card.sha256.encode()), dtype=torch.uint8)
    data = save(state)
    write_atomically(path, pa.Codec("zstd", compression_level=9).compress(data, asbytes=True))


def read_delta(prior: Prior, path: Path) -> Prior:
    """The constrained prior that `write_delta` wrote, on the device and with the card of ``prior``.

    Raises:
        UserError: not such a file, or one of another prior.
    """
    try:
        with pa.input_stream(str(path), compression="zstd") as file:
            state = load(file.read())
        made_from = bytes(state.pop(_PRIOR).tolist()).decode()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{path} is not the difference of a constrained prior: {error}.") from error
    if made_from != prior.card.sha256:
        raise UserError(
            f"{path} belongs to the prior with sha256 {made_from[:12]}…, not to {prior.card.name} "
            f"({prior.card.sha256[:12]}…)."
        )
    weights = {}
    for name, before in prior.network.state_dict().items():
        delta = state[name].float() * state[name + _SCALE]
        weights[name] = before + delta.to(before.device)
    device = next(prior.network.parameters()).device
    return replace(prior, network=Prior.from_state_dict(weights, prior.card, device).network)
