"""Summaries and intervals agree with SciPy and with figures computed by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gmp_atl.metrics import uar, war
from gmp_atl.statistics import paired_difference, sampling_interval, summarise, t_interval

PERCENT = st.floats(0, 100)
NAN = float("nan")


def grid(rows: list[list[float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, index=range(1, len(rows) + 1))


@pytest.mark.filterwarnings("ignore:Precision loss")
@given(st.lists(st.tuples(PERCENT, PERCENT), min_size=2, max_size=12))
def test_paired_interval_is_that_of_scipys_t_test(pairs):
    treated, reference = np.array(pairs).T
    with np.errstate(all="ignore"):
        expected = stats.ttest_rel(treated, reference).confidence_interval(0.95)
    difference = paired_difference(grid(treated[:, None].tolist()), grid(reference[:, None].tolist()))
    assert difference.mean == pytest.approx(np.mean(treated - reference), abs=1e-9)
    assert difference.over_folds.n == len(pairs)
    assert difference.over_seeds is None
    if np.isfinite(expected.low):
        assert (difference.over_folds.low, difference.over_folds.high) == pytest.approx(tuple(expected), abs=1e-6)


def test_t_interval_by_hand():
    """Mean 3, standard deviation 1, n = 3: 4.303 (t, 2 degrees of freedom, 97.5 %) / sqrt(3) = 2.484."""
    interval = t_interval([2.0, 3.0, 4.0])
    assert (interval.low, interval.high) == pytest.approx((0.516, 5.484), abs=1e-3)
    assert interval.n == 3


@pytest.mark.parametrize("values", [[], [1.0]])
def test_no_interval_of_fewer_than_two(values):
    assert t_interval(values) is None


def test_folds_and_seeds_are_summarised_apart():
    """Fold means are 61 and 71; seed means are 65, 66 and 67."""
    summary = summarise(grid([[60, 61, 62], [70, 71, 72]]))
    assert summary.mean == pytest.approx(66)
    assert summary.std_folds == pytest.approx(np.sqrt(50))
    assert summary.std_seeds == pytest.approx(1)


def test_one_seed_has_no_spread_over_seeds():
    assert summarise(grid([[60], [70]])).std_seeds is None


def test_a_seed_that_lacks_a_fold_does_not_spread():
    """Folds differ by far more than seeds: a mean over other folds is no estimate of the seeds' noise."""
    summary = summarise(grid([[60, 62, 61], [70, 72, NAN]]))
    assert summary.std_seeds == pytest.approx(np.sqrt(2))
    assert summary.mean == pytest.approx((61 + 71) / 2)


def test_nothing_evaluated_is_not_zero():
    summary = summarise(grid([[NAN], [NAN]]))
    assert (summary.mean, summary.std_folds, summary.std_seeds) == (None, None, None)


def test_only_what_both_have_is_compared():
    difference = paired_difference(grid([[62], [NAN], [75]]), grid([[60], [50], [70]]))
    assert difference.mean == pytest.approx(3.5)
    assert difference.over_folds.n == 2
    assert difference.over_seeds is None
    assert paired_difference(grid([[NAN], [1]]), grid([[1], [NAN]])) is None


def test_seeds_are_paired():
    """The seeds' means are 10 apart, their differences exactly 1 and 3."""
    difference = paired_difference(grid([[61, 73], [61, 73]]), grid([[60, 70], [60, 70]]))
    assert difference.mean == pytest.approx(2)
    expected = stats.ttest_rel([61, 73], [60, 70]).confidence_interval(0.95)
    assert (difference.over_seeds.low, difference.over_seeds.high) == pytest.approx(tuple(expected))
    assert difference.over_folds.low == pytest.approx(difference.over_folds.high)


@pytest.mark.parametrize("measure", ["UAR", "WAR"])
@pytest.mark.parametrize(
    ("recalls", "sizes"),
    [([0.05, 0.5, 0.9], [20, 60, 120]), ([0.95, 0.9, 0.8], [15, 9, 14]), ([0.7, 0.5, 0.6], [6, 5, 7])],
)
def test_the_interval_of_sampling_covers_as_often_as_it_says(measure, recalls, sizes):
    """Recalls are known, and matrices drawn: 95 of 100 intervals should hold the true figure."""
    random = np.random.default_rng(0)
    recalls, sizes = np.array(recalls), np.array(sizes)
    truth = 100 * (recalls.mean() if measure == "UAR" else recalls @ sizes / sizes.sum())
    held = 0
    for hits in random.binomial(sizes, recalls, size=(2000, 3)):
        matrix = np.diag(hits)
        matrix[[0, 1, 2], [1, 2, 0]] = sizes - hits
        interval = sampling_interval([matrix], measure)
        held += interval.low <= truth <= interval.high
        assert interval.n == sizes.sum()
    assert 0.94 < held / 2000 < 0.99


@given(st.lists(st.lists(st.integers(0, 50), min_size=9, max_size=9), min_size=1, max_size=3))
def test_the_interval_of_sampling_is_within_percent_and_around_what_was_found(counts):
    matrices = [np.reshape(each, (3, 3)) + np.eye(3, dtype=int) for each in counts]
    for measure, compute in (("UAR", uar), ("WAR", war)):
        interval = sampling_interval(matrices, measure)
        assert 0 <= interval.low < interval.high <= 100
        if len(matrices) == 1:
            assert interval.low <= compute(matrices[0]) <= interval.high + 1e-9


def test_seeds_do_not_make_the_interval_of_sampling_narrower():
    matrix = np.array([[8, 2], [3, 7]])
    assert sampling_interval([matrix], "UAR") == sampling_interval([matrix, matrix, matrix], "UAR")
