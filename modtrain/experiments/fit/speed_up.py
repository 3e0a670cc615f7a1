"""Effective speed-up: the factor of compute that a baseline needs to reach another's loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modtrain.experiments.fit.bootstrap import Estimate
from modtrain.experiments.fit.frontier import Frontier


@dataclass(frozen=True)
class SpeedUp:
    """Of ``family`` at C training FLOPs. factor: None where no compute gets the baseline there.

    loss: the family's at its optimum. is_extrapolated: the baseline has no points that far.
    """

    family: str
    C: float
    loss: float
    factor: Estimate
    is_extrapolated: bool


def speed_ups(
    name: str,
    baseline: tuple[Frontier, Frontier],
    family: tuple[Frontier, Frontier],
    budgets: Sequence[float],
    C_range: tuple[float, float],
    level: float,
) -> list[SpeedUp]:
    """Return the speed-up at each budget.

    baseline, family: the frontier, and those of the resamples. The two were resampled by
    themselves, so that resamples are paired by chance. C_range: of the baseline's points.
    """
    results = []
    for C in budgets:
        loss = family[0].loss(C)
        needed = baseline[0].flops(loss)
        needed_S = baseline[1].flops(family[1].loss(C))
        is_extrapolated = not C_range[0] <= needed <= C_range[1]
        factor = Estimate.of(needed / C, needed_S / C, level)
        results.append(SpeedUp(name, C, float(loss), factor, bool(is_extrapolated)))
    return results
