"""Intervals, paired tests, Holm's correction and the share of a gap: values worked out by hand or from tables."""

import pytest

from tuning.benchmark.statistics import Estimate, compare, corrected, estimate, gap_share


def test_interval_of_a_mean_is_students() -> None:
    found = estimate([1.0, 2.0, 3.0])  # sd 1, standard error 1/sqrt(3), t(2, .975) = 4.302653
    assert found.mean == 2.0
    assert found.low == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-6)
    assert found.high == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-6)
    assert estimate([1.0]) == Estimate(1.0, None, None, 1)


def test_pairs_are_the_replicates_that_both_have() -> None:
    found = compare({1: 0.8, 2: 0.7, 3: 0.9, 9: 0.0}, {1: 0.7, 2: 0.5, 3: 0.6})
    assert found.difference.mean == pytest.approx(0.2)
    assert found.difference.n == 3
    assert found.p == pytest.approx(0.0742, abs=1e-4)  # t = .2 / (.1 / sqrt 3) = 3.4641 with 2 degrees of freedom
    assert not found.difference.excludes_zero()


def test_equal_methods_do_not_differ() -> None:
    found = compare({1: 0.5, 2: 0.6}, {1: 0.5, 2: 0.6})
    assert found.difference.mean == 0
    assert found.p == 1.0


def test_holm_multiplies_the_smallest_by_all_and_never_falls() -> None:
    p = {"a": 0.01, "b": 0.04, "c": 0.03}
    raw = {name: compare({1: 1.0, 2: 2.0}, {1: 0.0, 2: 0.5})._replace(p=value) for name, value in p.items()}
    assert {k: v.p_holm for k, v in corrected(raw).items()} == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_share_of_the_gap_and_its_interval() -> None:
    lower = dict.fromkeys(range(6), 0.4)
    upper = {seed: 0.8 + 0.01 * seed for seed in range(6)}
    half = {seed: lower[seed] + 0.5 * (upper[seed] - lower[seed]) for seed in range(6)}
    share = gap_share(half, lower, upper)
    assert share == pytest.approx((0.5, 0.5, 0.5, 6))
    assert gap_share(lower, lower, upper) == pytest.approx((0, 0, 0, 6))


def test_no_share_of_a_gap_that_may_be_none() -> None:
    lower, upper = {1: 0.4, 2: 0.6, 3: 0.5}, {1: 0.6, 2: 0.5, 3: 0.51}
    assert gap_share(upper, lower, upper) is None
