"""Facts of statistics over seeds: spreads, intervals, paired tests and corrections."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from kdx.statistics import Spread, corrected, coverage, p_value, paired, spread


def test_a_spread_has_a_mean_a_sample_deviation_and_an_interval_around_the_mean() -> None:
    found = spread([0.5, 0.6, 0.7])
    assert found is not None
    assert found.mean == pytest.approx(0.6)
    assert found.std == pytest.approx(0.1)
    assert found.interval is not None
    low, high = found.interval
    assert 0.5 <= low < 0.6 < high <= 0.7
    assert spread([]) is None


def test_one_value_and_equal_values_have_no_interval() -> None:
    assert (Spread((0.5,)).std, Spread((0.5,)).interval) == (None, None)
    assert (Spread((0.5, 0.5)).std, Spread((0.5, 0.5)).interval) == (0.0, None)


def test_intervals_are_the_same_each_time_and_narrow_with_more_seeds() -> None:
    values = [float(value) for value in np.random.default_rng(0).normal(size=40)]
    few, many = Spread(tuple(values[:10])), Spread(tuple(values))
    assert few.interval == Spread(tuple(values[:10])).interval
    widths = []
    for one in (few, many):
        assert one.interval is not None
        widths.append(one.interval[1] - one.interval[0])
    assert widths[1] < widths[0]


def test_differences_are_paired_by_seed() -> None:
    assert paired({0: 0.5, 1: 0.7, 3: 0.9}, {1: 0.6, 0: 0.5, 2: 0.1}) == pytest.approx([0.0, 0.1])


def test_p_is_that_of_the_paired_t_test() -> None:
    first, second = [0.5, 0.6, 0.75], [0.4, 0.58, 0.7]
    differences = [a - b for a, b in zip(first, second, strict=True)]
    assert p_value(differences) == pytest.approx(float(stats.ttest_rel(first, second).pvalue))
    assert p_value([0.1]) is None
    assert p_value([0.25, 0.25]) is None


def test_p_values_are_raised_for_their_number_and_unknown_ones_stay_unknown() -> None:
    assert corrected({"a": 0.01, "b": None, "c": 0.04}) == pytest.approx({"a": 0.02, "c": 0.04})
    assert corrected({"a": None}) == {}


@pytest.mark.parametrize(("seeds", "expected"), [(2, 0.5), (3, 0.75), (5, 5 / 6)])
def test_intervals_of_few_seeds_hold_the_true_mean_as_often_as_is_said(seeds: int, expected: float) -> None:
    draws = np.random.default_rng(seeds).normal(size=(150, seeds))
    intervals = [Spread(tuple(map(float, row))).interval for row in draws]
    share = sum(found is not None and found[0] <= 0 <= found[1] for found in intervals) / len(intervals)
    assert share == pytest.approx(expected, abs=0.1)
    assert coverage(seeds) is not None


def test_nothing_is_said_of_the_width_for_one_seed_and_from_ten_on() -> None:
    assert coverage(1) is None
    assert coverage(10) is None
