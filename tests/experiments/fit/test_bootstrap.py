"""Resamples have the variance of the points, and intervals are their percentiles."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modtrain.experiments.fit.bootstrap import Estimate, budget_groups, resample_weights
from modtrain.experiments.fit.points import make_points

QUICK = settings(deadline=None, max_examples=50, derandomize=True)


@QUICK
@given(st.lists(st.floats(1e3, 1e6), min_size=1, max_size=30), st.floats(0, 0.5))
def test_a_budget_has_the_points_within_the_tolerance(flops, tolerance):
    points = make_points([1] * len(flops), N=[1] * len(flops), D=[1] * len(flops), C=flops)
    groups = budget_groups(points, tolerance)
    members = [i for group in groups.values() for i in group]
    assert len(members) == len(set(members))
    for C, group in groups.items():
        C_P = points.C_P[group]
        assert len(group) > 1
        assert C_P.max() <= C_P.min() * (1 + tolerance) * (1 + 1e-8)
        assert C_P.min() * (1 - 1e-8) <= C <= C_P.max() * (1 + 1e-8)


def test_a_budget_begins_where_the_one_before_ends():
    flops = [1.0, 1.02, 1.03, 1.9, 1.0, 1.04, 7.0]
    points = make_points([1] * 7, N=[1] * 7, D=[1] * 7, C=flops)
    groups = [group.tolist() for group in budget_groups(points, 0.02).values()]
    assert groups == [[0, 1, 4], [2, 5]]


def test_points_are_drawn_in_their_budgets():
    groups = [np.array([0, 1, 2]), np.array([4, 7])]
    weights_SP = resample_weights(9, groups, 400, np.random.default_rng(0))
    assert weights_SP.shape == (400, 9)
    for group in (*groups, [3, 5, 6, 8]):
        np.testing.assert_allclose(weights_SP[:, group].sum(1), len(group))
    assert (weights_SP == 0).any(0).all()
    alone = resample_weights(3, [np.array([0, 1])], 4, np.random.default_rng(0))
    assert (alone[:, 2] == 1).all()


def test_the_variance_of_a_mean_is_not_too_small():
    """At five points a draw of five would give 0.8 of it."""
    values, size = np.random.default_rng(1).standard_normal(5), 40_000
    weights_SP = resample_weights(5, [np.arange(5)], size, np.random.default_rng(2))
    variance = (weights_SP @ values / 5).var()
    assert variance == pytest.approx(values.var(ddof=1) / 5, rel=0.03)


@pytest.mark.parametrize(
    ("value", "samples", "expected"),
    [
        (3.0, np.arange(101.0), Estimate(3.0, 5.0, 95.0)),
        (3.0, [], Estimate(3.0)),
        (np.inf, [1, 2, 3], Estimate(None, 1.1, 2.9)),
        (2.0, [1.0, *[2.0] * 18, np.inf], Estimate(2.0, 1.0, 2.0)),
        (2.0, [1.0, *[2.0] * 10, np.inf, np.inf], Estimate(2.0, 1.0, None)),
        (2.0, [1.0, np.nan], Estimate(2.0)),
        (2.0, [2.0] * 19 + [np.nan], Estimate(2.0, 2.0, 2.0)),
    ],
)
def test_an_interval_is_of_percentiles(value, samples, expected):
    estimate = Estimate.of(value, samples, 0.9)
    for name in ("value", "low", "high"):
        assert getattr(estimate, name) == pytest.approx(getattr(expected, name))


def test_an_interval_contains_with_a_tolerance():
    estimate = Estimate(1.0, 0.9, 1.1)
    assert estimate.contains(1.1)
    assert not estimate.contains(1.11)
    assert estimate.contains(1.11, 0.01)
    assert Estimate(1.0).contains(7.0)
