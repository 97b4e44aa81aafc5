"""How sure a mean or a paired difference over faces is: bootstrap intervals and an equivalence test.

The unit is a face. Where several rows belong to one face (several seeds), their mean is taken first, for they
are no independent evidence: ``faces`` names the face of every row. Rows with a missing value (NaN or None: a
metric that could not be computed) are left out, in a pair both; ``n`` says how many faces are left.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from rgcp_core.errors import UserError

Values = Sequence[float] | Sequence[float | None] | np.ndarray

RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; the bounds are NaN for a single face or an infinite value."""

    mean: float
    low: float
    high: float
    n: int
    """Faces."""


@dataclass(frozen=True)
class Equivalence:
    """Result of two one-sided tests."""

    p_value: float
    """The larger of the two one-sided p-values."""
    equivalent: bool
    """Whether the mean difference is shown to lie within the margin, at the level asked for."""
    low: float
    """Lower bound of the 1 - 2 * level interval, which lies within the margin exactly when ``equivalent``."""
    high: float


def mean_interval(a: Values, confidence: float = 0.95, seed: int = 0, faces: Sequence[str] | None = None) -> Interval:
    """Mean over faces with its BCa bootstrap interval (Efron 1987).

    Args:
        a: (rows,) one metric.
        confidence: coverage aimed at, e.g. 0.95.
        seed: of the resampling.
        faces: (rows,) the face of each row; None when every row is a face of its own.

    Raises:
        UserError: no value left, unequal lengths, or a confidence outside (0, 1).
    """
    _check_share("confidence", confidence)
    values = _per_face(_floats(a), faces)
    mean, n = float(values.mean()), len(values)
    if n == 1 or not np.isfinite(values).all():  # infinite: the PSNR of two equal pictures
        return Interval(mean, float("nan"), float("nan"), n)
    if np.ptp(values) == 0:  # every resample has the same mean; BCa would divide by zero
        return Interval(mean, mean, mean, n)
    bounds = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=confidence,
        n_resamples=RESAMPLES,
        batch=max(1, 4_000_000 // n),  # bounds the memory at 32 MB
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(bounds.low), float(bounds.high), n)


def paired_difference(
    a: Values, b: Values, confidence: float = 0.95, seed: int = 0, faces: Sequence[str] | None = None
) -> Interval:
    """Mean of a - b over the same faces with its bootstrap interval: pairing removes how hard each face is.

    Args:
        a: (rows,) a metric of one method.
        b: (rows,) the same metric of the other, row by row of the same face and seed.
        confidence: coverage aimed at.
        seed: of the resampling.
        faces: (rows,) the face of each row, when faces have several.

    Raises:
        UserError: as `mean_interval`.
    """
    first, second = _floats(a), _floats(b)
    if len(first) != len(second):
        raise UserError(f"A pair needs the same rows in both; got {len(first)} and {len(second)}.")
    return mean_interval(first - second, confidence, seed, faces)


def tost(difference: Values, margin: float, level: float = 0.05, faces: Sequence[str] | None = None) -> Equivalence:
    """Two one-sided t-tests of a paired difference: is its mean within -margin..margin (Schuirmann 1987)?

    "No significant difference" is no evidence of equality; this test is. Set the margin before looking.

    Args:
        difference: (rows,) paired differences, e.g. fast preset minus paper preset.
        margin: the largest mean difference that does not matter, above 0, in the metric's unit.
        level: chance of a false claim of equivalence.
        faces: (rows,) the face of each row, when faces have several.

    Raises:
        UserError: a margin that is not above 0, a level outside (0, 0.5), fewer than two faces.
    """
    _check_share("2 * level", 2 * level)
    if not margin > 0:
        raise UserError(f"The margin of an equivalence test must be above 0; got {margin}.")
    values = _per_face(_floats(difference), faces)
    if len(values) < 2:
        raise UserError("An equivalence test needs two faces or more; got 1.")
    mean = float(values.mean())
    if np.ptp(values) == 0:  # no spread: the t statistic is infinite
        equivalent = abs(mean) < margin
        return Equivalence(0.0 if equivalent else 1.0, equivalent, mean, mean)
    above = stats.ttest_1samp(values, -margin, alternative="greater")
    below = stats.ttest_1samp(values, margin, alternative="less")
    p_value = float(max(above.pvalue, below.pvalue))
    bounds = stats.ttest_1samp(values, 0).confidence_interval(1 - 2 * level)
    return Equivalence(p_value, p_value < level, float(bounds.low), float(bounds.high))


def _floats(values: Values) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)  # None becomes NaN


def _per_face(values: np.ndarray, faces: Sequence[str] | None) -> np.ndarray:
    """Rows without NaN, averaged by face, in order of first appearance."""
    if values.ndim != 1:
        raise UserError(f"Expected one value a row; got an array of shape {values.shape}.")
    if faces is not None and len(faces) != len(values):
        raise UserError(f"Expected the face of every row: {len(values)} rows, {len(faces)} faces.")
    present = ~np.isnan(values)
    if not present.any():
        raise UserError("There is no face for which the value could be computed.")
    if faces is None:
        return values[present]
    by_face: dict[str, list[float]] = {}
    for face, value in zip(np.asarray(faces)[present], values[present], strict=True):
        by_face.setdefault(face, []).append(value)
    return np.array([np.mean(rows) for rows in by_face.values()])


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise UserError(f"{name} must lie between 0 and 1; got {value}.")
