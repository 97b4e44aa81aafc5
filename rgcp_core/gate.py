"""Is the restored face still the person of the input? What decides whether a result is kept.

A damaged face is unlike any sharp one to a recognition network, its own restoration included, so that input and result
are compared at one sharpness: the result is blurred until it is nearest to the input by pixels, and then embedded.

Measured with dlib and faces64 at 64 px: four people, two photos of each that no fine-tuning had seen, damaged in three
ways (16 px enlarged, blur of sigma 1.5, `old_photo`) and restored from K = 106 in 27 steps; personal priors had 80 x 4
steps at 2e-4 on 5 to 7 photos. Share that is refused:

| at least                   | right, unmodified prior (24) | right, own prior (24) | another person's prior (72) |
|----------------------------|------------------------------|-----------------------|-----------------------------|
| 0.930 with the input       | 4 %                          | 0 %                   | 47 %                        |
| 0.935                      | 4 %                          | 4 %                   | 57 %                        |
| 0.940                      | 12 %                         | 8 %                   | 71 %                        |
| 0.92 with the album alone  | -                            | 0 %                   | 49 %                        |
| 0.935, and 0.92            | 4 %                          | 4 %                   | 79 %                        |
| 0.940, and 0.92            | 12 %                         | 8 %                   | 83 %                        |

With both at one sharpness 61 % of the wrong ones are caught where 2 of the 48 right ones are refused, with the result
as it is 57 %: a small gain. Results that are another person's altogether (72) were caught in 93 %.

With a personal album, which may be somebody else's, both limits hold: 0.935 and 0.92. With a generative album nobody
else is at hand and the damage may be heavy: of 18 right restorations of six other faces under `blind` damage (K = 106)
0.935 refuses 33 %, 0.925 6 %, 0.92 none. So there the limit is 0.92.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from rgcp_core.metrics.identity import IdentityModel, Window, similarity

SMALLEST = 48
"""Side in pixels of the smallest crop that is judged: the rule was measured at 64 px, and below this the recognition
network is shown too little for any rule."""
BLURS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
"""Gaussian sigmas that are tried, in pixels of a 64 px face; larger faces are blurred in proportion."""


@dataclass(frozen=True)
class Likeness:
    """How like the input, and how like the album, a restored face is to a recognition network."""

    at_input: float
    """Cosine of the input and the result blurred to the input's sharpness."""
    input: float
    """Cosine of the input and the result as it is."""
    album: float | None
    """Mean cosine of the result and the album; None where the album is no longer there."""


def likeness(result: Tensor, y: Tensor, album: Tensor | None, identity: IdentityModel, crop_window: Window) -> Likeness:
    """Compare a restored face with its input and with the album, generative or personal.

    Args:
        result: (3,H,W) in [-1,1].
        y: (3,H,W) in [-1,1], the damaged input.
        album: (N,D) embeddings of the album, of length 1; None where it is no longer there.
        identity: the recognition network that made them.
        crop_window: the part of the FFHQ square that the pictures show.
    """
    embeddings = identity.embed(torch.stack([result, y, blurred_like(result, y)]), crop_window)
    both = similarity(embeddings[[0, 2]], embeddings[1:2])
    of_album = None if album is None else float((album @ embeddings[0]).mean())
    return Likeness(float(both[1]), float(both[0]), of_album)


def blurred_like(result: Tensor, y: Tensor) -> Tensor:
    """``result`` (3,H,W) blurred by the Gaussian that brings it nearest to ``y`` in mean squared difference."""
    scale = result.shape[-1] / 64
    picture = result.cpu().float().numpy()
    tried = [torch.from_numpy(gaussian_filter(picture, (0, s * scale, s * scale))) for s in BLURS]
    return min(tried, key=lambda each: float((each - y.cpu()).square().mean()))


def refusal(found: Likeness, *, min_input: float, min_album: float | None) -> str | None:
    """Why a result is refused, as a sentence; None when it is kept.

    Args:
        found: of the result.
        min_input: smallest ``at_input``.
        min_album: smallest ``album``, for a personal one; None where the album was drawn from the face itself.
    """
    if found.at_input < min_input:
        return (
            f"The restored face is not surely the person of the photo: similarity {found.at_input:.3f} at the photo's "
            f"sharpness, {min_input:g} wanted. It was kept as it was."
        )
    if min_album is not None and found.album is not None and found.album < min_album:
        return (
            f"The face was restored with a personal album but is not surely that person: similarity {found.album:.3f} "
            f"with the album, {min_album:g} wanted. It was kept as it was."
        )
    return None


def best_candidate(candidates: Sequence[Likeness], quality: Sequence[float] | None = None, tie: float = 0.005) -> int:
    """Number of the candidate to keep: the most like the input; of those within ``tie`` of it, the best looking.

    Args:
        candidates: one a seed.
        quality: higher is better, in the same order; None where it could not be measured.
        tie: difference of similarity that counts as none.
    """
    most = max(found.at_input for found in candidates)
    near = [i for i, found in enumerate(candidates) if found.at_input >= most - tie]
    if quality is None:
        return max(near, key=lambda i: candidates[i].at_input)
    return max(near, key=lambda i: quality[i])
