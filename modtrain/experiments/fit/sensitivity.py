"""How far the fit moves where a point, or a budget with all of its points, is left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modtrain.experiments.fit.config import LEAST_SIZES, FitConfig
from modtrain.experiments.fit.frontier import FlopsRule, Frontier
from modtrain.experiments.fit.law import HuberRegression, Law
from modtrain.experiments.fit.points import Array, Points

# With more points a single one has no weight, and the refits would take minutes.
_MOST_POINTS = 2_000


@dataclass(frozen=True)
class Range:
    """Lowest and highest value; at_low, at_high: what was left out, a row or a budget's C."""

    low: float
    high: float
    at_low: float
    at_high: float


@dataclass(frozen=True)
class Sensitivity:
    """Ranges of alpha, beta, E and the exponent of N*, by name; empty where there are none."""

    by_point: dict[str, Range]
    by_budget: dict[str, Range]


def leave_one_out(
    points: Points,
    regression: HuberRegression,
    start_K: Array,
    rule: FlopsRule,
    groups: dict[float, NDArray[np.intp]],
    config: FitConfig,
) -> tuple[Sensitivity, dict[str, str]]:
    """Return the ranges, and the reason for each part without one.

    start_K: the fit of all points, from which each refit starts.
    """
    reasons: dict[str, str] = {}
    all_points = {row: np.array([i]) for i, row in enumerate(points.rows)}
    by_point: dict[float, Law] = {}
    by_budget: dict[float, Law] = {}
    if len(points) > _MOST_POINTS:
        reasons["leave one point out"] = f"{len(points)} points, {_MOST_POINTS} at most"
    else:
        by_point = _refits(points, regression, start_K, all_points, config)
        if not by_point:
            reasons["leave one point out"] = "too few points would be left"
    by_budget = _refits(points, regression, start_K, groups, config)
    if not by_budget:
        reason = "too few points would be left" if groups else "no points share a budget"
        reasons["leave one budget out"] = reason
    return Sensitivity(_ranges(by_point, rule), _ranges(by_budget, rule)), reasons


def _refits(
    points: Points,
    regression: HuberRegression,
    start_K: Array,
    parts: dict[int, NDArray[np.intp]] | dict[float, NDArray[np.intp]],
    config: FitConfig,
) -> dict[float, Law]:
    laws = {}
    for label, part in parts.items():
        weight_P = np.ones(len(points))
        weight_P[part] = 0
        left = points.select(weight_P > 0)
        num_sizes = min(len(np.unique(left.N_P)), len(np.unique(left.D_P)))
        if len(left) >= config.min_points and num_sizes >= LEAST_SIZES:
            laws[label] = regression.law(regression.minimize(start_K, weight_P).theta_K)
    return laws


def _ranges(laws: dict[float, Law], rule: FlopsRule) -> dict[str, Range]:
    if not laws:
        return {}
    stacked, labels = Law.stack(list(laws.values())), list(laws)
    values = {
        "alpha": stacked.alpha,
        "beta": stacked.beta,
        "E": stacked.E,
        "exponent_N": Frontier(stacked, rule).parameter_exponent,
    }
    return {
        name: Range(
            float(estimates.min()),
            float(estimates.max()),
            labels[int(estimates.argmin())],
            labels[int(estimates.argmax())],
        )
        for name, estimates in values.items()
    }
