"""Out of the faces of a folder, the album of one person: who recurs, what is good enough, what it lacks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rgcp_core.errors import UserError
from rgcp_core.images import LUMA, resize
from rgcp_core.people import AlbumFace

FEW, TOO_FEW = 10, 3
"""Under the first the user is warned, under the second there is no album. The paper uses about 20 photos."""
SAME_PERSON = 0.92
"""Mean cosine (dlib) of a face with the person's other faces: see the table of `rgcp_core.people.match`. Album photos
are sharp, where 100 % of the right and 1.9 % of the wrong ones pass."""
COPY = 0.95
"""Correlation of two crops, reduced to 32 x 32 grey pixels, from which they count as one picture. Among the 173 pairs
of different photos of one person in people128 the largest was 0.911; copies with JPEG quality 30, three quarters of
the size or other brightness all had 0.994 and more, the median of those turned by 2 degrees 0.976."""
BLURRED = 0.15
"""Share of the album's median variance of the Laplacian below which a crop is too blurred. Among the 59 sharp crops of
people128 at 64 px the least sharp has 0.18 of the median; blurred by sigma 1 they have 0.09, by 0.7 they have 0.21."""
MIN_DETAIL = 0.75
"""Photo pixels a pixel of the prior's picture, along a side, below which a crop is too small: it would be enlarged."""
ONE_SIDED = 0.15
"""Spread of the yaw (see `yaw_of`) below which all faces look the same way, and of no more than that."""
SAME_LIGHT = 12.0
"""Spread of the mean brightness in grey levels below which the light is all alike."""


@dataclass(frozen=True, eq=False)
class FoundFace:
    """An aligned face of the folder and what is known about it."""

    facts: AlbumFace
    """Photo, sha256, number; without a verdict."""
    crop: Tensor
    """(3,S,S) in [-1,1]."""
    embedding: Tensor
    """(D,) of length 1."""


@dataclass(frozen=True, eq=False)
class AlbumChoice:
    """The album, and a verdict on every face."""

    album: tuple[FoundFace, ...]
    """With `similarity` in their facts."""
    left_out: tuple[AlbumFace, ...]
    variety: Mapping[str, float]
    warnings: tuple[str, ...]


def choose_album(faces: Sequence[FoundFace], *, same_person: float = SAME_PERSON) -> AlbumChoice:
    """Keep the person who recurs in most photos, then drop copies and faces too small or too blurred.

    Args:
        faces: all aligned faces of the folder.
        same_person: mean cosine with the person's other faces from which a face is that person.

    Raises:
        UserError: fewer than 3 faces remain, or two people recur equally often; says which and why.
    """
    verdicts: dict[int, str] = {}
    person = recurring_person(faces, same_person)
    similarity = {i: _mean_similarity(faces, i, person) for i in range(len(faces))}
    for i in range(len(faces)):
        if i not in person:
            verdicts[i] = (
                f"another person: mean similarity {similarity[i]:.3f} with the one who recurs, {same_person:g} wanted"
                if similarity[i] < same_person
                else f"a second face like this person's in one photo; the nearer one ({faces[i].facts.photo}) is used"
            )
    size = faces[0].crop.shape[-1] if faces else 0
    for i in person:
        pixels = faces[i].facts.pixels
        if pixels is not None and pixels < MIN_DETAIL * size:
            verdicts[i] = f"too small: {pixels:.0f} photo pixels a side, {MIN_DETAIL * size:.0f} wanted"
    left = [i for i in person if i not in verdicts]
    median = float(np.median([sharpness(faces[i].crop) for i in left])) if left else 0.0
    for i in left:
        share = sharpness(faces[i].crop) / median if median else 1.0
        if share < BLURRED:
            verdicts[i] = f"blurred: {share:.2f} of the album's usual sharpness, {BLURRED:g} wanted"
    left = [i for i in left if i not in verdicts]
    for i, copied in copies([faces[i].crop for i in left]).items():
        verdicts[left[i]] = f"nearly the same picture as {faces[left[copied]].facts.photo}"
    album = [i for i in person if i not in verdicts]
    if len(album) < TOO_FEW:
        raise UserError(_too_few(faces, album, verdicts))

    def told(i: int, members: Sequence[int]) -> AlbumFace:
        values = {"similarity": _mean_similarity(faces, i, members), "left_out": verdicts.get(i)}
        return faces[i].facts.model_copy(update=values)

    chosen = tuple(FoundFace(told(i, album), faces[i].crop, faces[i].embedding) for i in album)
    left_out = tuple(told(i, album) for i in range(len(faces)) if i not in album)
    variety = variety_of(chosen)
    return AlbumChoice(chosen, left_out, variety, tuple(_warnings(len(chosen), variety)))


def recurring_person(faces: Sequence[FoundFace], same_person: float) -> list[int]:
    """Which faces are those of the person who is in most photos, one face a photo.

    Every face in turn is asked in how many photos there is one like it; the one with the most is the core of a group,
    which then takes all faces that are like its members on average.

    Raises:
        UserError: another person is in as many photos.
    """
    if not faces:
        return []
    embeddings = torch.stack([face.embedding for face in faces])
    like = embeddings @ embeddings.T >= same_person

    def group(core: int, among: set[int]) -> list[int]:
        members = [i for i in range(len(faces)) if bool(like[core, i]) and i in among]
        best: dict[str, tuple[float, int]] = {}
        for i in among:
            near = _mean_similarity(faces, i, members)
            photo = faces[i].facts.sha256 or faces[i].facts.photo
            if (near >= same_person or i == core) and (photo not in best or near > best[photo][0]):
                best[photo] = (near, i)
        return sorted(i for _, i in best.values())

    def largest(among: set[int]) -> list[int]:
        groups = [group(i, among) for i in sorted(among)]
        return max(groups, key=len, default=[])

    first = largest(set(range(len(faces))))
    others = {i for i in range(len(faces)) if _mean_similarity(faces, i, first) < same_person}
    second = largest(others - set(first))
    if len(second) >= len(first) > 1:
        names = [", ".join(faces[i].facts.photo for i in members[:3]) for members in (first, second)]
        raise UserError(
            f"Two people recur equally often, in {len(first)} photos each (one in {names[0]}; the other in "
            f"{names[1]}). Leave photos of the wrong one out of the folder, or crop her or him away."
        )
    return first


def copies(crops: Sequence[Tensor]) -> dict[int, int]:
    """Pictures that are nearly another one: number -> number of the sharper one, which stays. See `COPY`."""
    if not crops:
        return {}
    alike = alikeness(torch.stack(list(crops))) >= COPY
    found: dict[int, int] = {}
    kept: list[int] = []
    for i in sorted(range(len(crops)), key=lambda i: -sharpness(crops[i])):
        other = next((j for j in kept if bool(alike[i, j])), None)
        if other is None:
            kept.append(i)
        else:
            found[i] = other
    return found


def alikeness(crops: Tensor) -> Tensor:
    """Correlations (N,N) of crops (N,3,H,W), reduced to 32 x 32 grey pixels: near 1 for prints of one photograph."""
    small = resize(crops, 32).mean(dim=1).flatten(1)
    small = torch.nn.functional.normalize(small - small.mean(dim=1, keepdim=True), dim=1)
    return small @ small.T


def grey(crop: Tensor) -> NDArray[np.float64]:
    """(3,H,W) in [-1,1] -> (H,W) grey levels 0..255 (Rec. 601)."""
    weights = torch.tensor(LUMA, dtype=torch.float64).view(3, 1, 1)
    return ((crop.double().cpu() + 1) * 127.5 * weights).sum(dim=0).numpy()


def sharpness(crop: Tensor) -> float:
    """Variance of the Laplacian (4 neighbours) of the grey levels of (3,H,W) in [-1,1]."""
    g = grey(crop)
    return float((g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]).var())


def yaw_of(landmarks: NDArray[np.float64]) -> float:
    """How far a face looks aside, from landmarks (5,2): where the tip of the nose lies between the eyes.

    -1 is under the eye on the picture's left, 0 in the middle, 1 under the other. A measure of variety, not an angle.
    """
    left, right, nose = landmarks[:3]
    across = right - left
    return float(2 * np.dot(nose - (left + right) / 2, across) / np.dot(across, across))


def variety_of(album: Sequence[FoundFace]) -> dict[str, float]:
    """Spread of pose, light and look; what could not be told is left out."""
    values: dict[str, float] = {}
    yaws = [face.facts.yaw for face in album if face.facts.yaw is not None]
    if len(yaws) > 1:
        values["yaw_spread"] = float(np.quantile(yaws, 0.9) - np.quantile(yaws, 0.1))
    values["brightness_spread"] = float(np.std([grey(face.crop).mean() for face in album]))
    similarities = [face.facts.similarity for face in album if face.facts.similarity is not None]
    values["mean_similarity"] = float(np.mean(similarities))
    return values


def _warnings(count: int, variety: Mapping[str, float]) -> list[str]:
    found = []
    if count < FEW:
        found.append(f"The album has {count} faces; from {FEW} on it is reliable, the paper used about 20.")
    if variety.get("yaw_spread", 1.0) < ONE_SIDED:
        found.append("All faces look the same way; photos from other sides would help.")
    if variety["brightness_spread"] < SAME_LIGHT:
        found.append("The light is the same in all photos; others would help.")
    return found


def _mean_similarity(faces: Sequence[FoundFace], i: int, members: Sequence[int]) -> float:
    others = [faces[j].embedding for j in members if j != i]
    return float((torch.stack(others) @ faces[i].embedding).mean()) if others else 0.0


def _too_few(faces: Sequence[FoundFace], album: Sequence[int], verdicts: Mapping[int, str]) -> str:
    reasons = "; ".join(f"{faces[i].facts.photo}: {reason}" for i, reason in list(verdicts.items())[:8])
    return (
        f"At least {TOO_FEW} good faces of one person are needed for an album, better 20; of {len(faces)} found, "
        f"{len(album)} can be used. {reasons}"
    )
