"""How good a picture looks without anything to compare it with: MUSIQ trained on KonIQ, and NIQE.

Both come from the package pyiqa, which is not among our requirements: its licence (PolyForm Noncommercial
and NTU S-Lab) allows non-commercial use only. Install it yourself where that fits: `pip install pyiqa`.
"""

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rgcp_core.errors import UserError
from rgcp_core.weights import load_state_dict, require_weights

Quality = Callable[[Tensor], Tensor]
"""Pictures (N,3,H,W) in [-1,1] -> (N,)."""

_NIQE_SIDE = 192  # two of NIQE's 96 px blocks each way: with fewer it has no covariance to compare


def load_quality(name: str, device: torch.device | str = "cpu") -> Quality:
    """Load a no-reference metric.

    Args:
        name: `musiq_koniq` (Ke et al. 2021), 0 to 100, higher is better; it sees the picture at its own size
            and at two reduced ones, so values of different sizes do not compare. Or `niqe` (Mittal et al.
            2013), lower is better, for pictures of 192 x 192 pixels and more.
        device: where it runs.

    Raises:
        UserError: unknown name, no pyiqa, or no weights; says which.
    """
    if name not in ("musiq_koniq", "niqe"):
        raise UserError(f"There is no quality metric {name!r}. Known: musiq_koniq, niqe.")
    pyiqa = _import_pyiqa()
    path = require_weights(name)
    with contextlib.redirect_stdout(io.StringIO()):  # pyiqa prints as it loads
        if name == "niqe":
            metric = pyiqa.create_metric("niqe", device=torch.device(device), pretrained_model_path=str(path))
        else:  # pretrained=False: it would download otherwise, and would unpickle whatever the file holds
            metric = pyiqa.create_metric("musiq", device=torch.device(device), pretrained=False)
            metric.net.load_state_dict(load_state_dict(path))

    def quality(images: Tensor) -> Tensor:
        if name == "niqe" and min(images.shape[-2:]) < _NIQE_SIDE:
            raise UserError(f"NIQE needs at least 192 x 192 pixels, got {tuple(images.shape[-2:])}.")
        unit = (images.float().clamp(-1, 1) + 1) / 2  # pyiqa's own range
        with torch.no_grad():
            return torch.stack([metric(image[None].to(device)).reshape(()).cpu() for image in unit])

    return quality


def _import_pyiqa() -> Any:
    try:
        import pyiqa
    except ImportError as error:
        raise UserError(
            f"The package pyiqa is not installed ({error}). Its licence allows non-commercial use only; "
            "where that fits: pip install pyiqa."
        ) from error
    return pyiqa
