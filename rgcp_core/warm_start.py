"""A shared warm start: one fine-tuning of a prior on an archive's own cleaner faces, before the per-face ones.

What an archive has in common, its tone, its film and its printing, is learned once and not anew for every face.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import median_filter
from torch import Tensor

from rgcp_core.compute import Precision
from rgcp_core.constrain import Progress, album_loss, constrain_prior
from rgcp_core.errors import UserError
from rgcp_core.personal_album import MIN_DETAIL, FoundFace, copies, grey
from rgcp_core.prior import Prior
from rgcp_core.settings import ConstrainSettings

WARM_START = ConstrainSettings(iterations=300, learning_rate=1e-4, learning_rate_decay="linear")
"""At all times t: one warm prior serves the album, every noise step, and a person's fine-tuning."""
FEWEST = 8
"""Clean faces below which an archive cannot teach: its few faces would be learned by heart."""
LEAST_DETAIL = 100.0
"""`detail` below which a crop is no clean one. Of 189 held-out clean crops at 64 px 96 % have more; damaged by
`old_photo` none, by `blind` 11 %, by `fading` 30 %, by low resolution, blur or noise none. Compression (100 %) and
scratches (100 %) are not seen."""
HELD_OUT = 4
"""Every so manieth clean face is not trained on: the error on these says whether anything was learned."""
LOOKS = 4
"""Times t at which each face held out is looked at; with one, their spread hides a small gain."""


@dataclass(frozen=True, eq=False)
class CleanFaces:
    """The cleaner faces of an archive."""

    crops: Tensor
    """(N,3,S,S) in [-1,1], the cleanest first."""
    found: int
    """Faces that were looked at."""
    left_out: dict[str, int]
    """Why faces were left out, and how many."""


@dataclass(frozen=True)
class WarmStart:
    """A prior fine-tuned on an archive and what that changed."""

    prior: Prior
    loss_before: float
    """Noise error of the unmodified prior on the faces held out, over all t, with fixed noise."""
    loss_after: float
    """The same of the fine-tuned one."""


def detail(crop: Tensor) -> float:
    """How much fine structure (3,H,W) in [-1,1] has that is not noise, in squared grey levels.

    The variance of the Laplacian (4 neighbours) after a median over 3 x 3 pixels, less what the picture's own white
    noise would have put into it without the median: (4^2 + 4) sigma^2. Sigma is the median of the finest diagonal Haar
    coefficients over 0.6745 (Donoho and Johnstone 1994). So a blurred crop has little, a noisy one less than none.
    """
    g = grey(crop)
    smooth = median_filter(g, 3)
    laplacian = smooth[:-2, 1:-1] + smooth[2:, 1:-1] + smooth[1:-1, :-2] + smooth[1:-1, 2:] - 4 * smooth[1:-1, 1:-1]
    return float(laplacian.var()) - 20 * noise_sigma(g) ** 2


def noise_sigma(g: np.ndarray) -> float:
    """Standard deviation of white noise in grey levels (H,W), from the finest diagonal Haar coefficients."""
    height, width = (side - side % 2 for side in g.shape)
    g = g[:height, :width]
    diagonal = (g[::2, ::2] - g[1::2, ::2] - g[::2, 1::2] + g[1::2, 1::2]) / 2
    return float(np.median(np.abs(diagonal)) / 0.6745)


def choose_clean(faces: Sequence[FoundFace], most: int, least_detail: float = LEAST_DETAIL) -> CleanFaces:
    """The cleaner faces: at most ``most`` and at most half of what is large enough and there only once.

    Raises:
        UserError: fewer than 8 remain; says why the others do not do.
    """
    left_out: Counter[str] = Counter()
    large = []
    for face in faces:
        if face.facts.pixels is not None and face.facts.pixels < MIN_DETAIL * face.crop.shape[-1]:
            left_out["too small"] += 1
        else:
            large.append(face.crop)
    copied = copies(large)
    left_out["copies of another"] = len(copied)
    alone = [crop for i, crop in enumerate(large) if i not in copied]
    details = [detail(crop) for crop in alone]
    clean = [i for i in np.argsort(details, kind="stable")[::-1] if details[i] >= least_detail]
    left_out["blurred, noisy or faded"] = len(alone) - len(clean)
    chosen = clean[: min(most, (len(alone) + 1) // 2)]
    left_out["less clean than those taken"] = len(clean) - len(chosen)
    if len(chosen) < FEWEST:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count) or "none"
        raise UserError(
            f"A warm start learns from the cleaner half of an archive's faces and needs {FEWEST} of them; of "
            f"{len(faces)} faces found {len(chosen)} can be used. Left out: {reasons}. Give it more photos, or better "
            "ones of the same kind."
        )
    crops = torch.stack([alone[i] for i in chosen])
    return CleanFaces(crops, len(faces), {reason: count for reason, count in left_out.items() if count})


def warm_start(
    prior: Prior,
    crops: Tensor,
    tuning: ConstrainSettings,
    *,
    precision: Precision = "bfloat16",
    seed: int,
    unit: str,
    on_step: Progress | None = None,
) -> WarmStart:
    """Fine-tune a copy of ``prior`` on ``crops`` (N,3,S,S) in [-1,1], a quarter of them held out to measure on.

    Args:
        prior: the unmodified prior.
        crops: an archive's cleaner faces.
        tuning: see `constrain_prior`.
        precision: of the fine-tuning; the errors are measured in float32.
        seed: of all draws.
        unit: name of the archive; with the seed it decides every draw.
        on_step: progress callback.

    Raises:
        UserError: fewer than 8 crops, or the error on those held out did not fall: nothing was learned that carries
            over from one face of the archive to another.
    """
    if len(crops) < FEWEST:
        raise UserError(f"A warm start needs {FEWEST} faces or more, got {len(crops)}.")
    device = next(prior.network.parameters()).device
    crops = crops.to(device)
    steps = prior.schedule.steps
    kept = torch.arange(len(crops)) % HELD_OUT != HELD_OUT - 1
    held_out = crops[~kept].repeat(LOOKS, 1, 1, 1)
    before = album_loss(prior, held_out, steps)
    tuned = constrain_prior(
        prior, crops[kept], **tuning.arguments(), precision=precision, seed=seed, unit=unit, on_step=on_step
    )
    after = album_loss(tuned.prior, held_out, steps)
    if not after < before:
        raise UserError(
            f"The warm start brought nothing: the denoising error on {len(held_out) // LOOKS} faces held out went from "
            f"{before:.5f} to {after:.5f}. The prior suits this archive as it is, or its faces have little in common."
        )
    return WarmStart(tuned.prior, before, after)
