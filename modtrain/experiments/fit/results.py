"""Results of a fit: laws and optima, what was refused, and warnings."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from modtrain.experiments.fit.bootstrap import Estimate
from modtrain.experiments.fit.config import FitConfig
from modtrain.experiments.fit.frontier import Frontier
from modtrain.experiments.fit.law import LawFit
from modtrain.experiments.fit.parabolas import Parabola
from modtrain.experiments.fit.points import Points
from modtrain.experiments.fit.sensitivity import Sensitivity
from modtrain.experiments.fit.speed_up import SpeedUp


@dataclass(frozen=True)
class Refusal:
    """A part that was not fitted. C: the budget that it is of, if it is of one."""

    family: str
    part: str
    reason: str
    C: float | None = None


@dataclass(frozen=True)
class Optimum:
    """What is best at a budget under the law. is_extrapolated: no point has as few or many FLOPs.

    num_points: that have this budget.
    """

    C: float
    num_points: int
    is_extrapolated: bool
    N: Estimate
    D: Estimate
    loss: Estimate


@dataclass(frozen=True)
class FamilyFit:
    """The fit of one family.

    groups: indices of the points of each shared budget. law: the result. check: the same law by
    variable projection. frontier, frontiers: the optimum under the law, and under the laws of the
    resamples, (S,). exponents: of N*, D* and L* - E in C. parabola_exponent: of N*, from the
    parabolas.
    """

    name: str
    points: Points
    num_left_out: int
    groups: dict[float, NDArray[np.intp]]
    fit: LawFit
    law: dict[str, Estimate]
    check: dict[str, Estimate]
    frontier: Frontier
    frontiers: Frontier
    exponents: dict[str, Estimate]
    optima: list[Optimum]
    parabolas: list[Parabola]
    parabola_exponent: Estimate | None
    sensitivity: Sensitivity


@dataclass(frozen=True)
class Fit:
    """The fits of all families, and what was refused or has to be known."""

    config: FitConfig
    derived: str
    families: dict[str, FamilyFit] = field(default_factory=dict)
    speed_ups: list[SpeedUp] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
