"""The best loss that a number of training FLOPs can buy under a law, and what buys it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from modtrain.experiments.fit.law import Law
from modtrain.experiments.fit.points import Points

# Outside this, FLOPs a token would fall with N or grow by far more than any architecture's.
_GROWTH = (-0.5, 1.0)


@dataclass(frozen=True)
class FlopsRule:
    """C = coefficient · N^(1 + growth) · D: what a token costs. C = 6ND has 6 and 0.

    largest_error: of the points' C, as a share.
    """

    coefficient: float
    growth: float
    largest_error: float

    @classmethod
    def of(cls, points: Points) -> FlopsRule:
        """Fit the rule to points whose C is counted; where one of N, D, C is derived it is 6ND."""
        if points.derived:
            return cls(6.0, 0.0, 0.0)
        x_P, cost_P = np.log(points.N_P), np.log(points.C_P / points.N_P / points.D_P)
        growth = 0.0
        if len(np.unique(points.N_P)) > 2:
            growth = float(np.polyfit(x_P - x_P.mean(), cost_P, 1)[0])
            growth = growth if _GROWTH[0] < growth < _GROWTH[1] else 0.0
        rest_P = cost_P - growth * x_P
        largest = float(np.abs(np.expm1(rest_P - rest_P.mean())).max())
        return cls(float(np.exp(rest_P.mean())), growth, largest)

    def tokens(self, N: Any, C: Any) -> Any:
        """Return the tokens that C FLOPs train N parameters on."""
        return C / (self.coefficient * N ** (1 + self.growth))


@dataclass(frozen=True)
class Frontier:
    """The optimum of a law, or of (S,) laws, under a budget of C training FLOPs.

    With tokens D = C / (k N^(1+g)) the loss is least at an N that grows as C^(beta / (alpha +
    beta (1 + g))), in closed form (arXiv 2203.15556, equation 4, which has g = 0).
    """

    law: Law
    rule: FlopsRule

    @property
    def parameter_exponent(self) -> Any:
        """N* grows as C to this."""
        return self.law.beta / self._sum

    @property
    def token_exponent(self) -> Any:
        """D* grows as C to this."""
        return self.law.alpha / self._sum

    @property
    def loss_exponent(self) -> Any:
        """L* - E falls as C to minus this."""
        return self.law.alpha * self.law.beta / self._sum

    def parameters(self, C: Any) -> Any:
        """Return the optimal number of parameters."""
        law, steepness = self.law, 1 + self.rule.growth
        ratio = law.alpha * law.A / (steepness * law.beta * law.B)
        return (ratio * (C / self.rule.coefficient) ** law.beta) ** (1 / self._sum)

    def tokens(self, C: Any) -> Any:
        """Return the optimal number of tokens."""
        return self.rule.tokens(self.parameters(C), C)

    def loss(self, C: Any) -> Any:
        """Return the loss at the optimum, in nats a token."""
        return self.law.loss(self.parameters(C), self.tokens(C))

    def flops(self, loss: Any) -> Any:
        """Return the FLOPs whose optimum has this loss; infinite at E or below."""
        above = np.asarray(loss - self.law.E, dtype=float)
        at_one = self.loss(1.0) - self.law.E
        with np.errstate(divide="ignore", invalid="ignore"):
            roots = (np.where(above > 0, above, np.nan) / at_one) ** (-1 / self.loss_exponent)
        return np.where(above > 0, roots, np.inf)

    @property
    def _sum(self) -> Any:
        return self.law.alpha + self.law.beta * (1 + self.rule.growth)
