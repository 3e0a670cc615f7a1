"""Resamples of points, and the intervals that they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modtrain.experiments.fit.points import Array, Points

_LEAST_NUMBERS = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its percentile interval. None: not finite, or without an interval."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: Any, samples_S: Any, level: float) -> Estimate:
        """Return ``value`` with the interval of ``level`` of its resamples; S may be 0.

        A resample may be infinite; an end of the interval that is gets None. With more than one
        in 20 that are not a number there is no interval.
        """
        samples = np.asarray(samples_S, dtype=float).ravel()
        is_number = ~np.isnan(samples)
        if samples.size == 0 or is_number.mean() < _LEAST_NUMBERS:
            return cls(_finite(value))
        samples = samples[is_number]
        is_finite = bool(np.isfinite(samples).all())
        ends = np.quantile(
            samples,
            [(1 - level) / 2, (1 + level) / 2],
            method="linear" if is_finite else "inverted_cdf",
        )
        return cls(_finite(value), _finite(ends[0]), _finite(ends[1]))

    def contains(self, value: float | None, tolerance: float = 0.0) -> bool:
        """Whether the interval, wider by ``tolerance`` relatively, has ``value`` in it."""
        if value is None or self.low is None or self.high is None:
            return True
        slack = tolerance * abs(value)
        return self.low - slack <= value <= self.high + slack


def budget_groups(points: Points, tolerance: float) -> dict[float, NDArray[np.intp]]:
    """Return the indices of the points that share a budget, by their geometric mean C.

    The C of a group are at most ``tolerance`` above its lowest; points alone are in none.
    """
    order = np.argsort(points.C_P, kind="stable")
    groups: list[list[int]] = []
    for i in order:
        lowest = points.C_P[groups[-1][0]] if groups else 0.0
        # Equal FLOPs may differ in the last digits of a file.
        if groups and points.C_P[i] <= lowest * (1 + tolerance) * (1 + 1e-9):
            groups[-1].append(int(i))
        else:
            groups.append([int(i)])
    return {
        float(np.exp(np.log(points.C_P[group]).mean())): np.array(sorted(group))
        for group in groups
        if len(group) > 1
    }


def resample_weights(
    num_points: int, groups: list[NDArray[np.intp]], num_samples: int, rng: np.random.Generator
) -> Array:
    """Return how often each point is in each resample, (S, P), as weights.

    Points are drawn anew in each group, and those of no group among themselves. Of n points n - 1
    are drawn, with weight n / (n - 1): with n draws the variance would be too small by 1 - 1 / n,
    a fifth at five points (Rao and Wu 1988, Journal of the American Statistical Association 83).
    """
    alone = np.setdiff1d(np.arange(num_points), np.concatenate([*groups, np.array([], int)]))
    weights_SP = np.ones((num_samples, num_points))
    for group in [*groups, alone]:
        if (n := len(group)) > 1:
            counts = rng.multinomial(n - 1, np.full(n, 1 / n), size=num_samples)
            weights_SP[:, group] = counts * (n / (n - 1))
    return weights_SP


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
