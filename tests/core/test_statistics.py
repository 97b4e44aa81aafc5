"""Intervals against known coverage and scipy; the equivalence test against Student's t written out."""

import math

import numpy as np
import pytest
from scipy import stats

from rgcp_core import statistics
from rgcp_core.errors import UserError


def test_interval_agrees_with_students_t_on_gaussian_data() -> None:
    a = np.random.default_rng(0).normal(3.0, 2.0, 400)
    interval = statistics.mean_interval(a)
    expected = stats.t.interval(0.95, 399, a.mean(), stats.sem(a))
    assert interval.mean == pytest.approx(a.mean())
    assert (interval.low, interval.high) == pytest.approx(expected, abs=0.03)
    assert interval.n == 400
    wider = statistics.mean_interval(a, confidence=0.99)
    expected = stats.t.interval(0.99, 399, a.mean(), stats.sem(a))
    assert (wider.low, wider.high) == pytest.approx(expected, abs=0.04)


def test_interval_covers_the_true_mean_about_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 skewed samples of 40 faces, 80 % intervals: 160 expected, binomial standard deviation 5.7."""
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    rng = np.random.default_rng(1)
    covered = 0
    for i in range(200):
        interval = statistics.mean_interval(rng.exponential(1.0, 40), confidence=0.8, seed=i)
        covered += interval.low <= 1.0 <= interval.high
    assert 160 - 20 <= covered <= 160 + 17  # 3 deviations; at n = 40 the bootstrap covers a little less


def test_pairing_removes_the_difficulty_of_a_face() -> None:
    rng = np.random.default_rng(2)
    difficulty = rng.normal(0, 10, 100)
    a = difficulty + 0.5 + rng.normal(0, 0.1, 100)
    interval = statistics.paired_difference(a, difficulty)
    assert interval.low < 0.5 < interval.high
    assert interval.high - interval.low < 0.06  # 2 * 1.96 * 0.1 / sqrt(100) = 0.039
    reverse = statistics.paired_difference(difficulty, a)
    assert reverse.mean == pytest.approx(-interval.mean)


def test_same_seed_same_interval() -> None:
    a = np.random.default_rng(3).normal(size=30)
    assert statistics.mean_interval(a, seed=4) == statistics.mean_interval(a, seed=4)
    assert statistics.mean_interval(a, seed=4) != statistics.mean_interval(a, seed=5)


def test_seeds_of_one_face_count_once() -> None:
    """Ten rows a face, nearly copies: the interval is that of the faces, not sqrt(10) times narrower."""
    rng = np.random.default_rng(4)
    by_face = rng.normal(0, 1, 50)
    rows = np.repeat(by_face, 10) + rng.normal(0, 1e-6, 500)
    faces = [f"face{i}" for i in range(50) for _ in range(10)]
    order = rng.permutation(500)
    clustered = statistics.mean_interval(rows[order], faces=[faces[i] for i in order])
    assert clustered.n == 50
    plain = statistics.mean_interval(by_face)
    assert clustered.high - clustered.low == pytest.approx(plain.high - plain.low, rel=0.05)
    # Faces weigh the same whatever their number of rows.
    uneven = statistics.mean_interval([1.0, 1.0, 1.0, 4.0], faces=["a", "a", "a", "b"])
    assert uneven.mean == pytest.approx(2.5)


def test_missing_values_leave_the_pair_out() -> None:
    interval = statistics.paired_difference([1.0, None, 3.0, 4.0], [0.0, 5.0, math.nan, 1.0])
    assert interval.mean == pytest.approx(2.0)
    assert interval.n == 2
    with pytest.raises(UserError, match="no face"):
        statistics.mean_interval([None, math.nan])


def test_intervals_without_spread_or_with_one_face() -> None:
    assert statistics.mean_interval([2.0, 2.0, 2.0]) == statistics.Interval(2.0, 2.0, 2.0, 3)
    single = statistics.mean_interval([2.0])
    assert single.n == 1
    assert math.isnan(single.low)
    assert math.isnan(single.high)
    infinite = statistics.mean_interval([30.0, 31.0, math.inf])
    assert infinite.mean == math.inf
    assert math.isnan(infinite.low)


@pytest.mark.parametrize(("shift", "margin"), [(0.02, 0.1), (0.09, 0.1), (-0.3, 0.1), (0.0, 0.001)])
def test_tost_is_students_t_written_out(shift: float, margin: float) -> None:
    difference = np.random.default_rng(5).normal(shift, 0.2, 60)
    result = statistics.tost(difference, margin)
    mean, error = difference.mean(), difference.std(ddof=1) / math.sqrt(60)
    p_low = stats.t.sf((mean + margin) / error, 59)
    p_high = stats.t.cdf((mean - margin) / error, 59)
    assert result.p_value == pytest.approx(max(p_low, p_high))
    half = stats.t.ppf(0.95, 59) * error
    assert (result.low, result.high) == pytest.approx((mean - half, mean + half))
    assert result.equivalent == (-margin < result.low and result.high < margin)
    assert result.equivalent == (result.p_value < 0.05)


def test_tost_is_scipys_paired_t_test_of_shifted_values() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.normal(5, 1, 40), rng.normal(5, 1, 40)
    above = stats.ttest_rel(a + 0.8, b, alternative="greater").pvalue
    below = stats.ttest_rel(a - 0.8, b, alternative="less").pvalue
    assert statistics.tost(a - b, 0.8).p_value == pytest.approx(max(above, below))


def test_tost_errs_at_its_level_on_the_margin() -> None:
    """With a true difference of exactly the margin, 5 % of 1000 samples may pass; 3 deviations are 2.1 %."""
    rng = np.random.default_rng(7)
    passed = sum(statistics.tost(rng.normal(0.5, 1, 50), 0.5).equivalent for _ in range(1000))
    assert 29 <= passed <= 71


def test_tost_averages_seeds_and_needs_spread_only_where_there_is_some() -> None:
    rows, faces = [0.0, 0.2, 0.1, 0.3, -0.1, 0.1], ["a", "a", "b", "b", "c", "c"]
    assert statistics.tost(rows, 1.0, faces=faces) == statistics.tost([0.1, 0.2, 0.0], 1.0)
    assert statistics.tost([0.0, 0.0, 0.0], 0.1).equivalent
    assert not statistics.tost([0.2, 0.2, 0.2], 0.1).equivalent


def test_wrong_calls_say_what_is_wrong() -> None:
    with pytest.raises(UserError, match="same rows"):
        statistics.paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(UserError, match="confidence"):
        statistics.mean_interval([1.0, 2.0], confidence=95)
    with pytest.raises(UserError, match="face of every row"):
        statistics.mean_interval([1.0, 2.0], faces=["a"])
    with pytest.raises(UserError, match="margin"):
        statistics.tost([1.0, 2.0], -1)
    with pytest.raises(UserError, match="two faces"):
        statistics.tost([1.0], 1)
