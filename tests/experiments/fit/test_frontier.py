"""The optimum in closed form is the one that a search finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from modtrain.experiments.fit.frontier import FlopsRule, Frontier
from modtrain.experiments.fit.law import Law
from modtrain.experiments.fit.points import make_points
from modtrain.experiments.fit.speed_up import speed_ups
from tests.experiments.fit.simulated import LAW, faster

EXPONENTS = st.floats(0.1, 1.0)
FRONTIERS = st.builds(
    lambda at_N, at_D, E, alpha, beta, k, growth: Frontier(
        Law(at_N * 1e8**alpha, at_D * 1e10**beta, E, alpha, beta), FlopsRule(k, growth, 0.0)
    ),
    *(st.floats(0.1, 5), st.floats(0.1, 5), st.floats(0.1, 3), EXPONENTS, EXPONENTS),
    *(st.floats(1, 10), st.floats(-0.4, 0.4)),
)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(FRONTIERS, st.floats(1e18, 1e21))
def test_the_optimum_is_that_of_a_search(frontier, C):
    def loss(log_N):
        return frontier.law.loss(np.exp(log_N), frontier.rule.tokens(np.exp(log_N), C))

    minimum = minimize_scalar(loss, bracket=(np.log(1e7), np.log(1e9)), tol=1e-10)
    assert frontier.loss(C) == pytest.approx(minimum.fun, rel=1e-9)
    assert np.log(frontier.parameters(C)) == pytest.approx(minimum.x, abs=1e-3)
    assert frontier.tokens(C) == frontier.rule.tokens(frontier.parameters(C), C)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(FRONTIERS, st.floats(1e18, 1e21))
def test_exponents_are_slopes_and_flops_inverts_the_loss(frontier, C):
    slope = np.log(frontier.parameters(10 * C) / frontier.parameters(C)) / np.log(10)
    assert slope == pytest.approx(frontier.parameter_exponent, rel=1e-6)
    slope = np.log(frontier.tokens(10 * C) / frontier.tokens(C)) / np.log(10)
    assert slope == pytest.approx(frontier.token_exponent, rel=1e-6)
    above = [frontier.loss(c) - frontier.law.E for c in (C, 10 * C)]
    assert np.log(above[0] / above[1]) / np.log(10) == pytest.approx(
        frontier.loss_exponent, rel=1e-3
    )
    assert frontier.flops(frontier.loss(C)) == pytest.approx(C, rel=1e-3)
    assert np.isinf(frontier.flops(frontier.law.E))


def test_6nd_gives_the_exponents_of_the_paper():
    frontier = Frontier(LAW, FlopsRule(6.0, 0.0, 0.0))
    assert frontier.parameter_exponent == pytest.approx(0.28 / 0.62)
    assert frontier.token_exponent == pytest.approx(0.34 / 0.62)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.floats(0.5, 20), st.floats(-0.3, 0.5))
def test_what_a_token_costs_is_read_off_the_points(coefficient, growth):
    N, D = np.geomspace(1e5, 1e8, 9), np.geomspace(1e9, 1e7, 9)
    points = make_points([3] * 9, N=N, D=D, C=coefficient * N ** (1 + growth) * D)
    rule = FlopsRule.of(points)
    assert (rule.coefficient, rule.growth) == pytest.approx((coefficient, growth), rel=1e-6)
    assert rule.largest_error < 1e-9
    uneven = make_points([3] * 9, N=N, D=D, C=points.C_P * np.array([1.1] + [1] * 8))
    assert 0.03 < FlopsRule.of(uneven).largest_error < 0.1
    assert FlopsRule.of(make_points([3] * 9, N=N, D=D)) == FlopsRule(6.0, 0.0, 0.0)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.floats(0.2, 5))
def test_a_family_that_needs_a_share_of_the_compute_has_that_speed_up(factor):
    rule = FlopsRule(6.0, 0.0, 0.0)
    base, other = Frontier(LAW, rule), Frontier(faster(LAW, factor), rule)
    none = Frontier(Law.stack([]), rule)
    for speed_up in speed_ups("f", (base, none), (other, none), [1e19, 1e21], (1e19, 1e21), 0.9):
        assert speed_up.factor.value == pytest.approx(factor, rel=1e-6)
        if abs(factor - 1) > 1e-6:
            assert speed_up.is_extrapolated == (not 1e19 <= factor * speed_up.C <= 1e21)


def test_a_loss_below_the_baselines_floor_has_no_factor():
    rule = FlopsRule(6.0, 0.0, 0.0)
    low = Law(LAW.A, LAW.B, 0.5, LAW.alpha, LAW.beta)
    base, other, samples = Frontier(LAW, rule), Frontier(low, rule), [LAW, low, low, low]
    drawn = Frontier(Law.stack(samples), rule)
    (speed_up,) = speed_ups("f", (base, drawn), (other, drawn), [1e24], (1e19, 1e21), 0.5)
    assert speed_up.factor.value is None
    (speed_up,) = speed_ups("f", (base, drawn), (base, drawn), [1e24], (1e19, 1e21), 0.5)
    assert speed_up.factor.value == pytest.approx(1)
