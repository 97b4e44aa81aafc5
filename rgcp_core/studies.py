"""The studies that test what the paper claims: their conditions, their faces, their claims, and the verdict on each.

| study               | changes                                     | in the paper        |
|---------------------|---------------------------------------------|---------------------|
| `noise-step`        | K, with and without constraining the prior  | supplement, Fig. 8  |
| `guidance-interval` | how often the album is guided               | supplement, Fig. 9  |
| `album-size`        | how many photos of the person there are     | Fig. 2, Table 2     |
| `distortion`        | what is wrong with the picture              | Fig. 1              |
| `samples`           | what the prior draws from pure noise        | supplement, Fig. 7  |
| `presets`           | our presets against the paper's settings    | ours                |

Every study has controls that must do worse: the unmodified prior, a prior constrained on somebody else's album.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rgcp_core.ablation import Anchors, Case, Condition
from rgcp_core.datasets import photo_seed
from rgcp_core.degrade import degrade
from rgcp_core.errors import UserError
from rgcp_core.personal_album import alikeness
from rgcp_core.prior import Card
from rgcp_core.settings import PRESETS, Settings, load_settings
from rgcp_core.statistics import Interval, paired_difference, tost
from rgcp_core.theory import equal_snr_step

StudyName = Literal["noise-step", "guidance-interval", "album-size", "distortion", "samples", "presets"]
STUDIES: tuple[StudyName, ...] = get_args(StudyName)

ALONE, CONSTRAINED, OTHERS = "prior alone", "constrained", "another face's album"
PERSONAL, STRANGERS = "personal album", "a stranger's photos"
STATED = "one K for all"
INPUT = "input"
"""Rows of the damaged picture itself."""

NOISE_STEPS_256 = (100, 200, 300, 400, 500, 600)
GUIDANCE_INTERVALS_256 = (0, 50, 20, 10, 1)
ALBUM_SIZES = (1, 2, 5, 10, 20)
TOO_ALIKE = 0.9
"""Correlation with the damaged photo (32 x 32 grey pixels) from which a photo is left out of its album: the two pairs
of the shared people that reach it, at 0.91, are much alike; all other pairs of one person stay below 0.86."""
SAMPLE_STEPS = 200
DISTORTIONS = (
    "low_resolution", "gaussian_noise", "jpeg", "scratches", "old_photo",
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """Mean of ``better`` minus ``worse`` over the faces, each a selection of rows: column -> value."""

    better: Mapping[str, Any]
    worse: Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, or of ours, as a difference whose sign is known beforehand."""

    text: str
    source: str
    metric: str
    difference: Difference
    higher: bool
    """Whether ``better`` is expected to have the higher value."""
    control: bool = False
    """A negative control: if it does not hold, the study shows nothing."""


@dataclass(frozen=True)
class Study:
    """A study, ready to run."""

    name: StudyName
    title: str
    axis: str
    conditions: tuple[Condition, ...]
    kinds: tuple[str, ...]
    """Damages: every face is shown with each."""
    claims: tuple[Claim, ...]
    people: bool = False
    """Whether the faces are several photos each of several people."""


def build_study(
    name: StudyName, card: Card, preset: str, overrides: Mapping[str, Any] | None = None, kind: str = "blind"
) -> Study:
    """A study at a prior's size.

    Args:
        name: which.
        card: of the prior.
        preset: whose settings hold where the study does not change them.
        overrides: single settings in place of the preset's, see `load_settings`.
        kind: the damage, except in `distortion`, which tries several.
    """
    chosen = load_settings(preset, card, overrides)
    settings = chosen.at_one_noise_step(card)
    if name == "noise-step":
        return _noise_step(card, settings, kind)
    if name == "guidance-interval":
        return _guidance_interval(card, settings, kind)
    if name == "album-size":
        return _album_size(card, settings, kind)
    if name == "distortion":
        return _distortion(card, chosen)
    if name == "samples":
        return _samples(settings, kind)
    if name == "presets":
        return _presets(card, overrides, kind)
    raise UserError(f"Unknown study {name!r}; there are: {', '.join(STUDIES)}.")


def _condition(settings: Settings, name: str, anchors: Anchors = "own", **facts: Any) -> Condition:
    noise_step = settings.restore.noise_step
    t_end = None if noise_step == "auto" else settings.constrain.t_end(noise_step)
    return Condition(**{"t_end": t_end, **facts}, name=name, anchors=anchors, settings=settings)


def alone(settings: Settings) -> Settings:
    """The same restoration with the unmodified prior."""
    return settings.model_copy(update={"constrain": settings.constrain.model_copy(update={"iterations": 0})})


def _noise_step(card: Card, settings: Settings, kind: str) -> Study:
    alphas_cumprod = card.schedule.build().alphas_cumprod
    usual = settings.restore.noise_step
    assert usual != "auto"
    carried = {equal_snr_step(alphas_cumprod, k, 256, card.image_size) for k in NOISE_STEPS_256}
    steps = sorted(carried | {usual})
    # One constrained prior serves all K: it is trained at every t that the largest of them visits.
    t_end = settings.constrain.t_end(steps[-1])
    conditions = []
    for step in steps:
        at_step = settings.model_copy(update={"restore": settings.restore.model_copy(update={"noise_step": step})})
        level = float(step)
        conditions += [
            _condition(at_step, f"K = {step}, constrained", series=CONSTRAINED, level=level, t_end=t_end),
            _condition(alone(at_step), f"K = {step}, prior alone", series=ALONE, level=level),
        ]
    conditions.append(
        _condition(settings, f"K = {usual}, {OTHERS}", "other", series=OTHERS, level=float(usual), t_end=t_end)
    )
    first, last = float(steps[0]), float(steps[-1])
    ours, unconstrained = {"series": CONSTRAINED}, {"series": ALONE}
    here = {"level": float(usual)}
    claims = (
        Claim(
            "A constrained prior keeps the person better than the prior alone (all K together).",
            "supplement, Fig. 8", "identity_dlib", Difference(ours, unconstrained), True,
        ),
        Claim(
            "A constrained prior is nearer to the clean face than the prior alone (all K together).",
            "supplement, Fig. 8", "lpips_alex", Difference(ours, unconstrained), False,
        ),
        Claim(
            f"Without constraining, a large K loses the person (K = {steps[-1]} against {steps[0]}).",
            "section 3.1", "identity_dlib",
            Difference({**unconstrained, "level": first}, {**unconstrained, "level": last}), True,
        ),
        Claim(
            f"At the largest K = {steps[-1]} the constrained prior still keeps the person better than the prior alone.",
            "supplement, Fig. 8", "identity_dlib",
            Difference({**ours, "level": last}, {**unconstrained, "level": last}), True,
        ),
        Claim(
            f"Restoring brings the face nearer to the clean one than the input is (K = {usual}).",
            "section 3", "lpips_alex", Difference({**ours, **here}, {"series": INPUT}), False,
        ),
        Claim(
            f"Control: another face's album does worse (K = {usual}).",
            "control", "lpips_alex", Difference({**ours, **here}, {"series": OTHERS}), False, control=True,
        ),
        Claim(
            f"Control: another face's album keeps the person less well (K = {usual}).",
            "control", "identity_dlib", Difference({**ours, **here}, {"series": OTHERS}), True, control=True,
        ),
    )  # fmt: skip
    return Study("noise-step", "How far to noise", "noise step K", tuple(conditions), (kind,), claims)


def _guidance_interval(card: Card, settings: Settings, kind: str) -> Study:
    alphas_cumprod = card.schedule.build().alphas_cumprod
    scale = equal_snr_step(alphas_cumprod, 600, 256, card.image_size) / 600
    usual = max(1, round(20 * scale))
    carried = [max(1, round(stated * scale)) if stated else 0 for stated in GUIDANCE_INTERVALS_256]
    conditions = []
    for interval in dict.fromkeys(carried):  # those of a small prior may coincide
        album = settings.album.model_copy(update={"guidance_interval": interval})
        at_interval = settings.model_copy(update={"album": album})
        visited = settings.album.steps or settings.album.noise_step  # a strided album cannot be guided more often
        guides = min(settings.album.noise_step // interval, visited) if interval else 0
        name = f"every {interval}" if interval else "never"
        conditions.append(_condition(at_interval, name, level=float(guides), series=CONSTRAINED))
    conditions.append(_condition(alone(settings), ALONE, series=ALONE))
    skip, every, never = ({"condition": name} for name in (f"every {usual}", "every 1", "never"))
    claims = (
        Claim(
            "Guiding at every step drags the album down to the damaged picture.",
            "supplement, Fig. 9", "album_psnr_input", Difference(every, skip), True,
        ),
        Claim(
            "Without guidance the album loses the person.",
            "supplement, Fig. 9", "album_identity", Difference(skip, never), True,
        ),
        Claim(
            "Restoring with a skip-guided album is nearer to the clean face than with one guided at every step.",
            "supplement, Fig. 9", "lpips_alex", Difference(skip, every), False,
        ),
        Claim(
            "Restoring with a skip-guided album keeps the person better than with an unguided one.",
            "supplement, Fig. 9", "identity_dlib", Difference(skip, never), True,
        ),
        Claim(
            "Control: the unmodified prior does worse than one constrained on a skip-guided album.",
            "control", "lpips_alex", Difference(skip, {"series": ALONE}), False, control=True,
        ),
    )  # fmt: skip
    return Study(
        "guidance-interval", "How often to guide the album", "guided steps of the album", tuple(conditions), (kind,),
        claims,
    )  # fmt: skip


def _album_size(card: Card, settings: Settings, kind: str) -> Study:
    conditions = [
        _condition(settings, f"{size} photos", "personal", anchor_count=size, level=float(size), series=PERSONAL)
        for size in ALBUM_SIZES
    ]
    conditions += [
        _condition(settings, "generative album", series="generative album"),
        _condition(alone(settings), ALONE, series=ALONE),
        _condition(settings, STRANGERS, "stranger", series=STRANGERS),
    ]
    whole = {"series": PERSONAL, "whole_album": True}
    claims = (
        Claim(
            "A personal album keeps the person better than the generative one.",
            "Table 2", "identity_dlib", Difference(whole, {"series": "generative album"}), True,
        ),
        Claim(
            "A personal album keeps the person better than the unmodified prior.",
            "Table 2", "identity_dlib", Difference(whole, {"series": ALONE}), True,
        ),
        Claim(
            "More photos keep the person better (all that there are against one).",
            "Fig. 2", "identity_dlib", Difference(whole, {"series": PERSONAL, "level": 1.0}), True,
        ),
        Claim(
            "Restoring raises the likeness to the person above the input's.",
            "Table 2", "identity_dlib", Difference(whole, {"series": INPUT}), True,
        ),
        Claim(
            "Control: a stranger's photos keep the person less well than the person's own.",
            "control", "identity_dlib", Difference(whole, {"series": STRANGERS}), True, control=True,
        ),
        Claim(
            "The identity gate refuses what a stranger's prior made more often than what the person's own made.",
            "ours", "refused", Difference({"series": STRANGERS}, whole), True,
        ),
    )  # fmt: skip
    return Study(
        "album-size", "How many photos of the person", "photos in the personal album", tuple(conditions), (kind,),
        claims, people=True,
    )  # fmt: skip


def _distortion(card: Card, settings: Settings) -> Study:
    usual, picked = card.usual_noise_step, settings.restore.noise_step == "auto"
    by_damage = ", K by damage" if picked else ""
    conditions = [
        _condition(settings, f"{CONSTRAINED}{by_damage}", series=CONSTRAINED),
        _condition(alone(settings), f"{ALONE}{by_damage}", series=ALONE),
    ]
    if picked:
        stated = settings.at_one_noise_step(card)
        conditions.append(_condition(stated, f"constrained, K = {usual} for all", series=STATED))
    claims = [
        Claim(
            f"One prior restores {kind.replace('_', ' ')} without having been trained for it.",
            "Fig. 1", "lpips_alex",
            Difference({"series": CONSTRAINED, "kind": kind}, {"series": INPUT, "kind": kind}), False,
        )
        for kind in DISTORTIONS
    ]  # fmt: skip
    control = Difference({"series": CONSTRAINED}, {"series": ALONE})
    text = "Control: the unmodified prior does worse (all kinds together)."
    claims.append(Claim(text, "control", "lpips_alex", control, False, control=True))
    if picked:
        against = Difference({"series": CONSTRAINED}, {"series": STATED})
        text = f"K picked by a face's damage does better than K = {usual} for all (all kinds together)"
        claims.append(Claim(f"{text}.", "ours", "lpips_alex", against, False))
        claims.append(Claim(f"{text}: it keeps the person.", "ours", "identity_dlib", against, True))
    return Study("distortion", "What is wrong with the picture", "", tuple(conditions), DISTORTIONS, tuple(claims))


def _samples(settings: Settings, kind: str) -> Study:
    # A sample from pure noise visits every t, so the prior is trained at every t, whatever the preset does.
    drawing = settings.model_copy(update={"restore": settings.restore.model_copy(update={"steps": SAMPLE_STEPS})})
    conditions = (
        _condition(drawing, "sample, constrained", series=CONSTRAINED, unconditional=True, t_end=None),
        _condition(alone(drawing), "sample, prior alone", series=ALONE, unconditional=True),
    )
    ours, unconstrained = {"series": CONSTRAINED}, {"series": ALONE}
    claims = (
        Claim(
            "From pure noise a constrained prior draws faces that resemble the person.",
            "supplement, Fig. 7", "identity_dlib", Difference(ours, unconstrained), True,
        ),
        Claim(
            "... and that are nearer to the clean face.",
            "supplement, Fig. 7", "lpips_alex", Difference(ours, unconstrained), False,
        ),
    )  # fmt: skip
    return Study("samples", "What a constrained prior has learned", "", conditions, (kind,), claims)


def _presets(card: Card, overrides: Mapping[str, Any] | None, kind: str) -> Study:
    chosen = {name: load_settings(name, card, overrides).at_one_noise_step(card) for name in PRESETS}
    conditions = [_condition(settings, name, series=name) for name, settings in chosen.items()]
    conditions += [
        _condition(alone(chosen["balanced"]), ALONE, series=ALONE),
        _condition(chosen["balanced"], OTHERS, "other", series=OTHERS),
    ]
    return Study("presets", "Presets against the paper's settings", "", tuple(conditions), (kind,), ())


# ---------------------------------------------------------------------------------------------------------- cases


def damaged_cases(clean: Mapping[str, Tensor], kind: str, damage_seed: int) -> list[Case]:
    """Each clean face (3,H,W) in [-1,1], damaged; the next face of the set is its control."""
    cases = [Case(name, _damaged(name, face, kind, damage_seed), face, kind=kind) for name, face in clean.items()]
    if len(cases) < 2:
        return cases
    return [
        Case(case.face, case.y, case.clean, kind=kind, other=other)
        for case, other in zip(cases, [*cases[1:], cases[0]], strict=True)
    ]


def personal_cases(people: Mapping[str, Mapping[str, Tensor]], kind: str, damage_seed: int) -> list[Case]:
    """The first photo of each person, damaged; the others are the personal album, the next person's the control.

    A photo that is nearly the first one is left out of the album: it would hand the answer over.

    Raises:
        UserError: a person with fewer than two photos, or fewer than two people.
    """
    people = {name: _without_near_copies_of_the_first(photos) for name, photos in people.items()}
    poor = [name for name, photos in people.items() if len(photos) < 2]
    if len(people) < 2 or poor:
        raise UserError(
            f"The study needs two people or more with two photos or more each, a folder a person; got {len(people)} "
            f"people{', too few photos of ' + ', '.join(poor) if poor else ''}."
        )
    names = list(people)
    others = {name: torch.stack(list(photos.values())[1:]) for name, photos in people.items()}
    cases = []
    for name, next_name in zip(names, [*names[1:], names[0]], strict=True):
        photo, clean = next(iter(people[name].items()))
        face = f"{name}/{photo}"
        y = _damaged(face, clean, kind, damage_seed)
        cases.append(Case(face, y, clean, kind=kind, personal=others[name], stranger=others[next_name]))
    return cases


def _without_near_copies_of_the_first(photos: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with_first = alikeness(torch.stack(list(photos.values())))[0]
    return {name: photo for i, (name, photo) in enumerate(photos.items()) if i == 0 or with_first[i] < TOO_ALIKE}


def _damaged(name: str, clean: Tensor, kind: str, damage_seed: int) -> Tensor:
    return degrade(clean, kind, photo_seed(damage_seed, name)).image


def conditions_for(study: Study, case: Case) -> list[Condition]:
    """The study's conditions that the case allows: with 5 photos, an album of 10 would be the album of 5 again.

    The largest album keeps its place on the axis under the number of photos that it really has.
    """
    if case.personal is None:
        return list(study.conditions)
    there = len(case.personal)
    kept: list[Condition] = []
    for condition in study.conditions:
        if condition.anchors == "personal" and (condition.anchor_count or 0) >= there:
            if any(other.level == float(there) for other in kept):
                continue
            update = {"name": f"{there} photos", "level": float(there), "anchor_count": there}
            condition = condition.model_copy(update=update)
        kept.append(condition)
    return kept


# -------------------------------------------------------------------------------------------------------- verdicts


@dataclass(frozen=True)
class Verdict:
    """A claim and what was measured of it."""

    claim: Claim
    interval: Interval | None
    """Of better minus worse, paired over the faces (BCa bootstrap, 95 %); None when no face has both."""
    result: Literal["held", "not shown", "the opposite", "not measured"]
    """held: the interval lies on the expected side of 0. not shown: it contains 0."""


def judge(claim: Claim, rows: pd.DataFrame, seed: int = 0) -> Verdict:
    """Compare the two sides of a claim face by face; seeds of a face are averaged first."""
    if claim.metric not in rows:
        return Verdict(claim, None, "not measured")
    sides = [_by_face(rows, side, claim.metric) for side in (claim.difference.better, claim.difference.worse)]
    both = sides[0].index.intersection(sides[1].index)
    if not len(both):
        return Verdict(claim, None, "not measured")
    interval = paired_difference(sides[0][both].to_numpy(), sides[1][both].to_numpy(), seed=seed)
    towards, against = (interval.low, interval.high) if claim.higher else (-interval.high, -interval.low)
    # the bounds of a single face are NaN: nothing is shown
    result: Any = "held" if towards > 0 else "the opposite" if against < 0 else "not shown"
    return Verdict(claim, interval, result)


def _by_face(rows: pd.DataFrame, selection: Mapping[str, Any], metric: str) -> pd.Series:
    chosen = rows
    for column, value in selection.items():
        chosen = chosen[chosen[column] == value]
    return chosen.dropna(subset=[metric]).groupby("face")[metric].mean()


@dataclass(frozen=True)
class Equality:
    """Whether a preset equals `paper`, on one metric."""

    preset: str
    metric: str
    margin: float
    """Standard deviation of `paper` over its seeds, within a face, pooled over the faces."""
    interval: Interval
    """Preset minus paper, paired over faces and seeds."""
    low: float
    high: float
    """90 % interval of the two one-sided tests."""
    p_value: float
    equal: bool


def equality(rows: pd.DataFrame, metrics: Sequence[str], reference: str = "paper") -> list[Equality]:
    """Two one-sided tests of every other condition against ``reference``: inside the reference's own spread?

    A seed changes a picture of `paper` by so much that two of them differ by about the margin; a preset whose mean
    difference lies within it costs less than a change of seed. Both sides share their seeds, hence their noise.

    Raises:
        UserError: fewer than two faces, or a reference with fewer than two seeds a face.
    """
    paper = rows[rows["condition"] == reference]
    found = []
    for metric in metrics:
        by_face = paper.dropna(subset=[metric]).groupby("face")[metric]
        if by_face.ngroups < 2 or (by_face.count() < 2).any():
            raise UserError(f"The margin needs two faces or more with two seeds or more of {reference} ({metric}).")
        margin = float(np.sqrt(by_face.var(ddof=1).mean()))
        ours = paper.set_index(["face", "seed"])[metric]
        for preset in rows["condition"].unique():
            if preset in (reference, INPUT):
                continue
            theirs = rows[rows["condition"] == preset].set_index(["face", "seed"])[metric]
            difference = (theirs - ours).dropna()
            faces = list(difference.index.get_level_values("face"))
            test = tost(difference.to_numpy(), margin, faces=faces)
            interval = paired_difference(theirs[difference.index], ours[difference.index], faces=faces)
            found.append(Equality(preset, metric, margin, interval, test.low, test.high, test.p_value, test.equivalent))
    return found
