"""Which candidates survive a rung: non-dominated sorting, and a spread along the front.

Both objectives are minimized. After NSGA-II (Deb et al. 2002, IEEE Transactions on Evolutionary
Computation 6(2), section III), but for one thing: where a front does not fit whole, its most
crowded candidate is left out and the distances are computed again, so that two neighbours do not
both fall because each crowds the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Point = tuple[float, float]


def sort_fronts(points: Mapping[str, Point]) -> list[list[str]]:
    """Return the fronts, the non-dominated one first; within a front by the first objective.

    A candidate dominates another one if it is no worse in both objectives and better in one. Each
    front is what nothing dominates once those before it are taken away.
    """
    left = sorted(points, key=lambda name: (points[name], name))
    fronts = []
    while left:
        front: list[str] = []
        for name in left:
            # What comes later in this order can only be dominated by the last one of the front.
            if (
                not front
                or points[name][1] < points[front[-1]][1]
                or points[name] == points[front[-1]]
            ):
                front.append(name)
        fronts.append(front)
        taken = set(front)
        left = [name for name in left if name not in taken]
    return fronts


def crowding_distances(front: Sequence[str], points: Mapping[str, Point]) -> dict[str, float]:
    """Return for each candidate of a front how far apart its neighbours are; at the ends infinity.

    The distance is the sum over both objectives, each relative to the front's range.
    """
    distances = dict.fromkeys(front, 0.0)
    for objective in (0, 1):
        order = sorted(front, key=lambda name: (points[name][objective], name))
        values = [points[name][objective] for name in order]
        span = values[-1] - values[0]
        distances[order[0]] = distances[order[-1]] = math.inf
        for before, name, after in zip(values, order[1:-1], values[2:], strict=False):
            distances[name] += (after - before) / span if span else 0.0
    return distances


def select(points: Mapping[str, Point], count: int) -> list[str]:
    """Return the ``count`` best candidates, by front and then by crowding, in no special order."""
    chosen: list[str] = []
    for front in sort_fronts(points):
        if len(chosen) >= count:
            break
        chosen += _least_crowded(front, points, count - len(chosen))
    return chosen


def _least_crowded(front: Sequence[str], points: Mapping[str, Point], count: int) -> list[str]:
    left = list(front)
    while len(left) > count:
        distances = crowding_distances(left, points)
        # Of equals the one with the higher loss goes: of two ends the lower loss stays.
        left.remove(min(left, key=lambda name: (distances[name], -points[name][0], name)))
    return left
