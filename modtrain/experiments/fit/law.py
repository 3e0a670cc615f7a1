"""The parametric law of the loss, L(N, D) = E + A / N^alpha + B / D^beta, and its fit.

Hoffmann et al. 2022, arXiv 2203.15556, section 3.3 (Approach 3) and appendix D.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize

from modtrain.experiments.fit.config import FitConfig
from modtrain.experiments.fit.points import Array, Points

PARAMETERS = ("A", "B", "E", "alpha", "beta")
EXPONENT_RANGE = 0.01, 3.0
# Share of the loss.
_LEAST_TERM = 1e-4
# Starts whose objective is this close to the best one, relatively, have found the same minimum.
_SAME = 1e-6
# The objective is divided by delta², so that tolerances do not depend on it.
_OPTIONS = {"maxiter": 5_000, "maxfun": 20_000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 20}


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats a token.

    Each field is a NumPy number, or an array of shape (S,) for as many laws.
    """

    A: Any
    B: Any
    E: Any
    alpha: Any
    beta: Any

    def loss(self, N: Any, D: Any) -> Any:
        """Return the loss of a model with N parameters after D tokens, by broadcasting."""
        return self.E + self.A * N**-self.alpha + self.B * D**-self.beta

    def __iter__(self) -> Iterator[Any]:
        return iter(astuple(self))

    @classmethod
    def stack(cls, laws: list[Law]) -> Law:
        """Return one `Law` whose fields have shape (S,)."""
        return cls(*np.array([astuple(law) for law in laws], dtype=float).reshape(-1, 5).T)


@dataclass(frozen=True)
class Minimum:
    """Where the optimizer ended. theta_K: see `HuberRegression`."""

    theta_K: Array
    objective: float


class HuberRegression:
    """The Huber loss of the residuals of log L, as a function of five parameters.

    With x, y the logarithms of N and D less their means, log L is the log-sum-exp of a - alpha x,
    b - beta y and e, and theta_K = (a, b, e, alpha, beta). Without the means a and alpha would be
    all but collinear, and L-BFGS would end early. There are no bounds: a step that meets one ends
    in another minimum.
    """

    def __init__(self, points: Points, delta: float) -> None:
        self.log_loss_P, self.delta = np.log(points.loss_P), delta
        log_N_P, log_D_P = np.log(points.N_P), np.log(points.D_P)
        self.x_mean, self.y_mean = float(log_N_P.mean()), float(log_D_P.mean())
        self.x_P, self.y_P = log_N_P - self.x_mean, log_D_P - self.y_mean

    def residuals(self, theta_K: Array) -> tuple[Array, Array]:
        """Return the predicted less the observed log L, (P,), and its Jacobian, (P, K)."""
        a, b, e, alpha, beta = theta_K
        terms = np.stack([a - alpha * self.x_P, b - beta * self.y_P, np.full_like(self.x_P, e)])
        highest = terms.max(0)
        shares = np.exp(terms - highest)
        total = shares.sum(0)
        shares /= total
        slopes = [*shares, -self.x_P * shares[0], -self.y_P * shares[1]]
        return highest + np.log(total) - self.log_loss_P, np.stack(slopes, 1)

    def value_and_gradient(self, theta_K: Array, weight_P: Array) -> tuple[float, Array]:
        """Return the weighted sum of Huber losses over delta², and its gradient, (K,)."""
        residual_P, jacobian_PK = self.residuals(theta_K)
        scaled = residual_P / self.delta
        size = np.abs(scaled)
        huber = np.where(size <= 1, 0.5 * scaled**2, size - 0.5)
        slope = weight_P * np.clip(scaled, -1, 1) / self.delta
        return float(weight_P @ huber), slope @ jacobian_PK

    def minimize(self, start_K: Array, weight_P: Array) -> Minimum:
        """Return the minimum that L-BFGS finds from ``start_K``; weight_P: of each point."""
        result = minimize(
            self.value_and_gradient,
            start_K,
            args=(weight_P,),
            jac=True,
            method="L-BFGS-B",
            options=_OPTIONS,
        )
        return Minimum(result.x, float(result.fun))

    def law(self, theta_K: Array) -> Law:
        """Return the law of ``theta_K``."""
        a, b, e, alpha, beta = theta_K
        A, B = np.exp(a + alpha * self.x_mean), np.exp(b + beta * self.y_mean)
        return Law(A, B, np.exp(e), alpha, beta)

    def starts(self, count: int, rng: np.random.Generator) -> Array:
        """Draw ``count`` starts, (count, K), in the range of the points.

        E is a share of the lowest loss; what is left of the mean loss is split between the terms.
        """
        losses = np.exp(self.log_loss_P)
        E = rng.uniform(0.05, 0.98, count) * losses.min()
        split = rng.uniform(0.05, 0.95, count)
        rest = losses.mean() - E
        exponents = rng.uniform(0.05, 1.5, (2, count))
        at_centre = np.log([split * rest, (1 - split) * rest, E])
        return np.concatenate([at_centre, exponents]).T

    def undetermined(self, theta_K: Array) -> list[str]:
        """Return the names of the parameters that the points do not determine.

        A term that is a share below 1e-4 of the loss could be any, or none; so could an exponent
        that makes a term constant, or gone after the smallest sizes.
        """
        low, high = EXPONENT_RANGE
        is_lost = [*(theta_K[:3] < self.log_loss_P.min() + np.log(_LEAST_TERM))]
        is_lost += [not low <= exponent <= high for exponent in theta_K[3:]]
        return [name for name, lost in zip(PARAMETERS, is_lost, strict=True) if lost]


@dataclass(frozen=True)
class LawFit:
    """The best of several starts.

    num_agreeing: starts that ended at the same objective. undetermined: names of parameters that
    could be anything.
    """

    law: Law
    minimum: Minimum
    num_starts: int
    num_agreeing: int
    undetermined: list[str]


def fit_law(regression: HuberRegression, config: FitConfig, rng: np.random.Generator) -> LawFit:
    """Fit the law by L-BFGS from ``config.num_starts`` starts."""
    weight_P = np.ones_like(regression.x_P)
    starts = regression.starts(config.num_starts, rng)
    minima = [regression.minimize(start_K, weight_P) for start_K in starts]
    best = min(minima, key=lambda minimum: minimum.objective)
    # Without noise every objective is rounding alone.
    limit = best.objective * (1 + _SAME) + _SAME
    num_agreeing = sum(minimum.objective <= limit for minimum in minima)
    law, undetermined = regression.law(best.theta_K), regression.undetermined(best.theta_K)
    return LawFit(law, best, len(minima), num_agreeing, undetermined)
