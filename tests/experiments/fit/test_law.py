"""The law is recovered, and its fit is the minimum of the plain formula."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad, minimize
from scipy.special import huber

from modtrain.experiments.fit.config import FitConfig
from modtrain.experiments.fit.law import PARAMETERS, HuberRegression, Law, Minimum, fit_law
from modtrain.experiments.fit.projection import Projection
from tests.experiments.fit.simulated import LAW, simulated_points

DELTA = 1e-3


def fitted(points, num_starts=8, delta=DELTA):
    config = FitConfig(num_starts=num_starts)
    return fit_law(HuberRegression(points, delta), config, np.random.default_rng(0))


def test_the_gradient_is_that_of_numerical_differences():
    points = simulated_points(noise=0.002)
    rng = np.random.default_rng(1)
    regression = HuberRegression(points, 0.02)
    weight_P = rng.uniform(0, 3, len(points))
    for start_K in regression.starts(20, rng):
        error = check_grad(
            lambda theta_K: regression.value_and_gradient(theta_K, weight_P)[0],
            lambda theta_K: regression.value_and_gradient(theta_K, weight_P)[1],
            start_K,
        )
        size = np.linalg.norm(regression.value_and_gradient(start_K, weight_P)[1])
        assert error < 1e-4 * size


@settings(deadline=None, max_examples=4, derandomize=True)
@given(st.integers(0, 100), st.sampled_from([1e-3, 1e-2, 1.0]))
def test_the_objective_is_the_plain_formula(seed, delta):
    points = simulated_points(noise=0.01, seed=seed)
    rng = np.random.default_rng(seed)
    regression = HuberRegression(points, delta)
    theta_K, weight_P = regression.starts(1, rng)[0], rng.uniform(0, 3, len(points))
    law = regression.law(theta_K)
    residual_P = np.log(law.loss(points.N_P, points.D_P)) - np.log(points.loss_P)
    plain = weight_P @ huber(delta, residual_P) / delta**2
    assert regression.value_and_gradient(theta_K, weight_P)[0] == pytest.approx(plain, rel=1e-9)


@settings(deadline=None, max_examples=4, derandomize=True)
@given(
    alpha=st.floats(0.2, 0.6),
    beta=st.floats(0.2, 0.6),
    E=st.floats(0.5, 2.5),
    at_centre=st.tuples(st.floats(0.2, 2), st.floats(0.2, 2)),
)
def test_a_simulated_law_is_recovered_by_both_fits(alpha, beta, E, at_centre):
    A, B = at_centre[0] * 1e9**alpha, at_centre[1] * 1e10**beta
    law = Law(A, B, E, alpha, beta)
    points = simulated_points(law=law)
    assert list(fitted(points).law) == pytest.approx(list(law), rel=1e-3)
    projection, weight_P = Projection(points), np.ones(len(points))
    check = projection.fit(projection.grid_start(weight_P), weight_P)
    assert list(check) == pytest.approx(list(law), rel=1e-3)


def test_the_published_law_is_recovered():
    fit = fitted(simulated_points(), num_starts=8)
    assert list(fit.law) == pytest.approx(list(LAW), rel=1e-3)
    assert fit.num_agreeing == 8


@pytest.mark.parametrize("noise", [0.0005, 0.003, 0.02])
def test_the_fit_is_as_good_as_that_of_a_slow_reference(noise):
    """Nelder-Mead on the formula as it is printed, restarted till it gains nothing."""
    points = simulated_points(noise=noise, seed=3)
    fit = fitted(points)

    def plain(theta):
        a, b, E, alpha, beta = theta
        predicted = E + np.exp(a) / points.N_P**alpha + np.exp(b) / points.D_P**beta
        if not (predicted > 0).all():
            return np.inf
        return huber(DELTA, np.log(predicted) - np.log(points.loss_P)).sum()

    theta = np.array([np.log(LAW.A), np.log(LAW.B), LAW.E, LAW.alpha, LAW.beta])
    options = {"maxiter": 20_000, "maxfev": 20_000, "xatol": 1e-10, "fatol": 1e-16}
    for _ in range(4):
        theta = minimize(plain, theta, method="Nelder-Mead", options=options).x
    assert fit.minimum.objective * DELTA**2 <= plain(theta) * (1 + 1e-9)
    assert fit.num_agreeing == 8
    reference = [np.exp(theta[0]), np.exp(theta[1]), *theta[2:]]
    assert list(fit.law) == pytest.approx(reference, rel=0.01)


def test_the_best_start_is_taken():
    class Numbered(HuberRegression):
        objectives = iter([3.0, 1.0, 2.0, 1.0 + 1e-9])

        def minimize(self, start_K, weight_P):
            return Minimum(start_K, next(self.objectives))

    regression = Numbered(simulated_points(), DELTA)
    fit = fit_law(regression, FitConfig(num_starts=4), np.random.default_rng(0))
    assert (fit.minimum.objective, fit.num_starts, fit.num_agreeing) == (1.0, 4, 2)


def test_a_parameter_that_the_points_do_not_determine_is_named():
    points = simulated_points(law=Law(406.4, 0.0, 1.69, 0.34, 0.28))
    names = fitted(points, num_starts=2).undetermined
    assert set(names) & {"B", "beta", "E"}
    assert fitted(simulated_points(), num_starts=2).undetermined == []


def test_projection_is_the_least_squares_of_the_relative_residuals():
    """Against L-BFGS on all five parameters, with the Huber loss everywhere quadratic."""
    points = simulated_points(noise=0.002, seed=5)
    projection, weight_P = Projection(points), np.random.default_rng(0).uniform(0.5, 2, len(points))
    law = projection.fit(projection.grid_start(weight_P), weight_P)

    def plain(theta):
        a, b, E, alpha, beta = theta
        predicted = E + np.exp(a) / points.N_P**alpha + np.exp(b) / points.D_P**beta
        return weight_P @ (predicted / points.loss_P - 1) ** 2

    theta = np.array([np.log(LAW.A), np.log(LAW.B), LAW.E, LAW.alpha, LAW.beta])
    options = {"maxiter": 3_000, "maxfev": 3_000, "xatol": 1e-9, "fatol": 1e-15}
    for _ in range(2):
        theta = minimize(plain, theta, method="Nelder-Mead", options=options).x
    reference = dict(zip(PARAMETERS, [*np.exp(theta[:2]), *theta[2:]], strict=True))
    for name, value in zip(PARAMETERS, law, strict=True):
        assert value == pytest.approx(reference[name], rel=2e-3), name
