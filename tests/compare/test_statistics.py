"""Means, intervals and paired differences, against scipy and by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedlora.compare.statistics import Estimate, estimate, paired

scores = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=2, max_size=12)


@given(scores)
def test_an_interval_is_scipys_t_interval(values):
    found = estimate(values)
    assert found.interval is not None
    error = float(stats.sem(values))
    if error < 1e-12:
        assert found.interval == pytest.approx((values[0], values[0]), abs=1e-9)
        return
    wanted = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / len(values), scale=error)
    assert found.interval == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_three_values_by_hand():
    """Mean 2, standard deviation 1, and 4.302653 is the 97.5 % point of t with two degrees of freedom."""
    found = estimate([1.0, 2.0, 3.0])
    reach = 4.3026527 / math.sqrt(3)
    assert found.mean == 2.0
    assert found.interval == pytest.approx((2 - reach, 2 + reach), rel=1e-7)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=12))
def test_a_difference_excludes_zero_where_the_paired_t_test_says_so(pairs):
    ours, theirs = (dict(enumerate(column)) for column in zip(*pairs, strict=True))
    found = paired(ours, theirs)
    assert found is not None and found.interval is not None
    differences = [a - b for a, b in pairs]
    if stats.sem(differences) < 1e-9:  # there scipy divides rounding by rounding
        return
    p_value = stats.ttest_rel(list(ours.values()), list(theirs.values())).pvalue
    if abs(p_value - 0.05) > 1e-6:
        assert found.excludes_zero == (p_value < 0.05)


def test_only_seeds_that_both_have_are_paired():
    assert paired({1: 0.9, 2: 0.5, 3: 0.6}, {2: 0.4, 3: 0.4, 4: 0.0}) == estimate([0.5 - 0.4, 0.6 - 0.4])
    assert paired({1: 0.9}, {2: 0.9}) is None


def test_one_value_has_no_interval_and_excludes_nothing():
    assert estimate([0.7]) == Estimate(mean=0.7, interval=None)
    assert not estimate([0.7]).excludes_zero
    with pytest.raises(ValueError, match="0 values"):
        estimate([])


def test_equal_differences_are_no_certainty():
    """Two seeds that both gain exactly one test record say nothing of the next seed."""
    assert not estimate([0.5, 0.5]).excludes_zero
    assert estimate([0.5, 0.51]).excludes_zero
    assert estimate([-0.5, -0.51]).excludes_zero
    assert not estimate([-0.5, 0.51]).excludes_zero
