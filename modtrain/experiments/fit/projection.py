"""The same law by variable projection, as a check that shares no code with its fit.

For given exponents the law is linear in E, A and B: non-negative least squares of the relative
residuals gives them, and two exponents are left to search (arXiv 2603.22339).
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize, nnls

from modtrain.experiments.fit.law import EXPONENT_RANGE, Law
from modtrain.experiments.fit.points import Array, Points

_GRID = np.geomspace(*EXPONENT_RANGE, 24)
_OPTIONS = {"xatol": 1e-8, "fatol": 1e-13, "maxiter": 1_000, "maxfev": 2_000}


class Projection:
    """Least squares of the relative residuals (L(N, D) - L) / L over the two exponents."""

    def __init__(self, points: Points) -> None:
        self.inverse_loss_P = 1 / points.loss_P
        self.log_N_mean, self.log_D_mean = np.log(points.N_P).mean(), np.log(points.D_P).mean()
        self.x_P = np.log(points.N_P) - self.log_N_mean
        self.y_P = np.log(points.D_P) - self.log_D_mean

    def solve(self, exponents: Array, weight_P: Array) -> tuple[Array, float]:
        """Return E and the two terms at the points' centre, (3,), and the residuals' norm."""
        alpha, beta = exponents
        terms = [np.ones_like(self.x_P), np.exp(-alpha * self.x_P), np.exp(-beta * self.y_P)]
        root = np.sqrt(weight_P)
        coefficients, norm = nnls((root * self.inverse_loss_P * np.stack(terms)).T, root)
        return coefficients, float(norm)

    def grid_start(self, weight_P: Array) -> Array:
        """Return the best pair of exponents, (2,), of a grid."""
        pairs = [np.array([alpha, beta]) for alpha in _GRID for beta in _GRID]
        return min(pairs, key=lambda pair: self.solve(pair, weight_P)[1])

    def fit(self, start: Array, weight_P: Array) -> Law:
        """Return the law of the exponents that Nelder-Mead finds from ``start``, (2,)."""
        result = minimize(
            lambda exponents: self.solve(exponents, weight_P)[1],
            start,
            method="Nelder-Mead",
            bounds=[EXPONENT_RANGE] * 2,
            options=_OPTIONS,
        )
        alpha, beta = result.x
        (E, at_N, at_D), _ = self.solve(result.x, weight_P)
        A, B = at_N * np.exp(alpha * self.log_N_mean), at_D * np.exp(beta * self.log_D_mean)
        return Law(A, B, E, alpha, beta)
