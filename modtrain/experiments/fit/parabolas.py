"""A parabola of the loss over log N at each budget: drawn beside the law, and biased.

Hoffmann et al. 2022, arXiv 2203.15556, section 3.2 (Approach 2). Loss is not a parabola in log N,
so its minimum is biased even without noise, the more the wider or the less centred the sizes are
(arXiv 2603.22339).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modtrain.experiments.fit.bootstrap import Estimate
from modtrain.experiments.fit.config import FitConfig
from modtrain.experiments.fit.points import Array, Points

# Below this the interval would be of the resamples that happen to have a minimum.
_LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Parabola:
    """L = c_0 + c_1 z + c_2 z², z = log N - centre, at one budget.

    N, loss: at its minimum. share_interior: of the resamples, which have a minimum between the
    smallest and the largest size. N_S: their minima, NaN where there is none.
    """

    C: float
    coefficients: tuple[float, float, float]
    centre: float
    num_points: int
    N: Estimate
    loss: Estimate
    share_interior: float
    N_S: Array

    def loss_at(self, N: Array) -> Array:
        """Return the parabola's loss."""
        c0, c1, c2 = self.coefficients
        z = np.log(N) - self.centre
        return np.asarray(c0 + c1 * z + c2 * z * z)


def fit_parabolas(
    points: Points, groups: dict[float, NDArray[np.intp]], weights_SP: Array, config: FitConfig
) -> Iterator[Parabola | tuple[float, str]]:
    """Yield the parabola of each budget, or the budget and the reason why there is none."""
    for C, group in groups.items():
        yield _fit_one(points, C, group, weights_SP[:, group], config)


def _fit_one(
    points: Points, C: float, group: NDArray[np.intp], weights_SG: Array, config: FitConfig
) -> Parabola | tuple[float, str]:
    log_N, loss = np.log(points.N_P[group]), points.loss_P[group]
    num_sizes = len(np.unique(log_N))
    if num_sizes < config.min_points_per_budget:
        sizes = "1 size" if num_sizes == 1 else f"{num_sizes} sizes"
        return C, f"{sizes}, but a parabola needs {config.min_points_per_budget}"
    centre = float(log_N.mean())
    z = log_N - centre
    coefficients = _coefficients(z, loss, np.ones_like(z))
    minimum = _minimum(coefficients, z)
    if minimum is None:
        return C, _no_minimum(coefficients, points.N_P[group])
    minima = []
    for weights in weights_SG:
        drawn = _coefficients(z, loss, weights)
        minima.append(_minimum(drawn, z) or (np.nan, np.nan))
    minima_S2 = np.array(minima).reshape(-1, 2)
    interior = minima_S2[~np.isnan(minima_S2[:, 0])]
    share = len(interior) / max(len(minima), 1)
    samples = interior if share >= _LEAST_SHARE else interior[:0]
    return Parabola(
        C,
        (float(coefficients[0]), float(coefficients[1]), float(coefficients[2])),
        centre,
        len(group),
        Estimate.of(np.exp(minimum[0] + centre), np.exp(samples[:, 0] + centre), config.level),
        Estimate.of(minimum[1], samples[:, 1], config.level),
        share,
        np.exp(minima_S2[:, 0] + centre),
    )


def _coefficients(z: Array, loss: Array, weights: Array) -> Array:
    """Return the weighted least squares parabola, (3,); NaN where fewer than three sizes count."""
    if len(np.unique(z[weights > 0])) < 3:
        return np.full(3, np.nan)
    root = np.sqrt(weights)
    design = np.stack([np.ones_like(z), z, z * z], 1)
    return np.asarray(np.linalg.lstsq(root[:, None] * design, root * loss)[0])


def _minimum(coefficients: Array, z: Array) -> tuple[float, float] | None:
    """Return where the parabola is least, and its value; None where that is not between points."""
    c0, c1, c2 = coefficients
    if not c2 > 0:
        return None
    at = -c1 / (2 * c2)
    return (float(at), float(c0 + c1 * at / 2)) if z.min() < at < z.max() else None


def _no_minimum(coefficients: Array, N: Array) -> str:
    if not coefficients[2] > 0:
        return "its parabola has no minimum: train sizes further from the best one"
    side = "above the largest" if coefficients[1] < 0 else "below the smallest"
    size = N.max() if coefficients[1] < 0 else N.min()
    return f"its minimum is not interior but {side} size, N = {size:.3g}: train sizes beyond it"
