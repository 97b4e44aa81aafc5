"""Numbers that say how good a restored face is. Each is named after what exactly was computed.

| column                                   | what is compared                        | module   | better |
|------------------------------------------|-----------------------------------------|----------|--------|
| `psnr`, `ssim`                           | restored with clean                     | fidelity | higher |
| `lpips_alex`                             | restored with clean                     | fidelity | lower  |
| `identity_dlib`, `identity_arcface`      | restored with clean, or else with album | identity | higher |
| `identity_input_dlib`, `..._arcface`     | restored with input                     | identity | higher |
| `niqe`                                   | restored alone                          | quality  | lower  |
| `musiq_koniq`                            | restored alone                          | quality  | higher |
| `input_` before any but `identity_input` | input in place of restored              |          |        |

`clean` is the undamaged picture, `input` the damaged one, `album` other pictures of the same person (the
similarity is then the mean over them). FID and KID belong to sets, not to faces: see `distribution`.
"""

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from rgcp_core.errors import UserError

from .fidelity import Lpips, psnr, ssim
from .identity import Window, load_identity, similarity
from .quality import load_quality

METRICS = (
    "psnr",
    "ssim",
    "lpips_alex",
    "identity_dlib",
    "identity_arcface",
    "identity_input_dlib",
    "identity_input_arcface",
    "niqe",
    "musiq_koniq",
)
"""The columns of restored faces."""

INPUT_METRICS = tuple(f"input_{name}" for name in METRICS if not name.startswith("identity_input_"))
"""The same of the damaged inputs, to see what restoring has gained."""

_lpips = lru_cache(Lpips)
_identity = lru_cache(load_identity)
_quality = lru_cache(load_quality)


def measure_faces(
    restored: Tensor,
    input: Tensor | None = None,
    clean: Tensor | None = None,
    *,
    which: Sequence[str] = METRICS,
    crop_window: Window,
    device: torch.device | str = "cpu",
    album: Tensor | None = None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Measure a batch of restored faces.

    Args:
        restored, input, clean: (N,3,H,H) in [-1,1], in the same order; None where there is none.
        which: columns from `METRICS` and `INPUT_METRICS`.
        crop_window: the part of the FFHQ square that all these pictures show, from the prior's card.
        device: for the networks. They stay loaded for the next call.
        album: (M,3,H,H), pictures of the one person that all N faces show.

    Returns:
        The columns that could be computed, N numbers each (`psnr` is infinite for equal pictures), and for
        every other column of `which` the reason why not. No column is in both.

    Raises:
        UserError: an unknown column, or pictures that are not finite or not of one shape.
    """
    unknown = sorted(set(which) - {*METRICS, *INPUT_METRICS})
    if unknown:
        raise UserError(f"There are no metrics {unknown}. Known: {', '.join(METRICS + INPUT_METRICS)}.")
    pictures = {"restored": restored, "input": input, "clean": clean, "album": album}
    for name, batch in pictures.items():
        if batch is None:
            continue
        if batch.ndim != 4 or batch.shape[1:] != restored.shape[1:]:
            raise UserError(f"Expected {name} to be {tuple(restored.shape)}, got {tuple(batch.shape)}.")
        if name != "album" and len(batch) != len(restored):
            raise UserError(f"Expected {len(restored)} {name} pictures, one a face, got {len(batch)}.")
        if not torch.isfinite(batch).all():
            raise UserError(f"The {name} pictures hold NaN or infinity: they cannot be measured.")
    device = str(device)

    def picture(name: str) -> Tensor:
        batch = pictures[name]
        if batch is None:
            raise UserError(f"There is no {name} picture to compare with.")
        return batch

    @cache
    def embedding(network: str, name: str) -> Tensor:
        return _identity(network, device).embed(picture(name), crop_window)

    def column(subject: str, metric: str) -> Tensor:
        """`metric` of the pictures called `subject`."""
        if metric == "psnr":
            return psnr(picture(subject), picture("clean"))
        if metric == "ssim":
            return ssim(picture(subject), picture("clean"))
        if metric == "lpips_alex":
            return _lpips(device)(picture(subject), picture("clean"))
        if metric in ("niqe", "musiq_koniq"):
            return _quality(metric, device)(picture(subject))
        network = metric.rsplit("_", 1)[1]
        if metric.startswith("identity_input_"):
            return similarity(embedding(network, subject), embedding(network, "input"))
        if clean is None and album is not None:
            return (embedding(network, subject) @ embedding(network, "album").T).mean(dim=1)
        return similarity(embedding(network, subject), embedding(network, "clean"))

    values: dict[str, list[float]] = {}
    unavailable: dict[str, str] = {}
    for name in which:
        subject = "input" if name in INPUT_METRICS else "restored"
        try:
            values[name] = column(subject, name.removeprefix("input_")).tolist()
        except UserError as error:
            unavailable[name] = str(error)
    return values, unavailable
