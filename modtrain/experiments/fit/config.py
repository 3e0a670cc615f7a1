"""Typed configuration of a fit. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, broken_rules

QUANTITIES = ("loss", "N", "D", "C", "family")
# The law has five parameters: with fewer points than this it has nothing to be judged by.
LEAST_POINTS = 6
# Different N, and different D: with two, E and an exponent would be one number.
LEAST_SIZES = 3
_LEAST_SAMPLES = 20


@dataclass
class FitConfig:
    """A scaling law for each family of models, fitted to the final losses of finished trainings.

    points: CSV file with a row for each training, and the headings ``loss`` (nats a token), two or
        three of ``N`` (parameters), ``D`` (tokens) and ``C`` (training FLOPs), and where it has
        several families ``family``.
    output: directory for ``fit.json`` and the figures.
    columns: quantity → heading in the file, where the file names it otherwise:
        ``'columns={loss: final_loss, N: params}'``.
    families: families to fit; empty: all of them.
    baseline: family that the others' effective speed-up is over.
    parameters: which parameters N counts, as text for ``fit.json`` and the figures: exponents
        depend on it.
    drop_highest_losses: how many points with the highest losses are left out of each family.
    min_points: points that a family needs.
    min_points_per_budget: sizes that a parabola needs at a budget.
    budget_tolerance: points whose training FLOPs differ by at most this share have the same budget.
    budgets: training FLOPs to predict the optimum at, besides those of the points.
    huber_delta: residual of the logarithm of the loss from which on it counts linearly.
    num_starts: starts of the optimizer.
    bootstrap_samples: resamples for the intervals; 0: no intervals.
    level: of the intervals.
    seed: of starts and resamples.
    max_bytes: size from which on a file is refused.
    """

    points: str | None = None
    output: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    families: list[str] = field(default_factory=list)
    baseline: str = "dense"
    parameters: str | None = None
    drop_highest_losses: int = 0
    min_points: int = 10
    min_points_per_budget: int = 4
    budget_tolerance: float = 0.02
    budgets: list[float] = field(default_factory=list)
    huber_delta: float = 1e-3
    num_starts: int = 32
    bootstrap_samples: int = 200
    level: float = 0.9
    seed: int = 0
    max_bytes: int = 2**26

    def problems(self, needs_files: bool = True) -> list[Problem]:
        """Everything wrong with the fit; needs_files: whether it is of a file and is written."""
        return [
            *(self._file_problems() if needs_files else []),
            *self._choice_problems(),
            *at_least(self, "", LEAST_POINTS, "min_points"),
            *at_least(self, "", 4, "min_points_per_budget"),
            *at_least(self, "", 0, "drop_highest_losses", "seed"),
            *at_least(self, "", 1, "num_starts", "max_bytes"),
            *above_zero(self, "", "huber_delta"),
            *self._number_problems(),
        ]

    def _file_problems(self) -> list[Problem]:
        points, output = self.points, self.output
        is_there = points is not None and Path(points).exists() and not Path(points).is_dir()
        in_the_way = output is not None and Path(output).exists() and not Path(output).is_dir()
        csv = "write points=FILE.csv, with the columns loss and two of N, D and C"
        return broken_rules(
            self,
            "",
            (not points, "points", "a fit needs points", csv),
            (bool(points) and not is_there, "points", "is not a file", csv),
            (not output, "output", "a fit needs a place", "write output=DIRECTORY"),
            (in_the_way, "output", "is a file", "name a directory"),
        )

    def _choice_problems(self) -> list[Problem]:
        names = ", ".join(QUANTITIES)
        problems = [
            Problem("columns", name, "is not a quantity", f"the quantities are {names}")
            for name in self.columns
            if name not in QUANTITIES
        ]
        twice = len(set(self.columns.values())) < len(self.columns)
        repeated = len(set(self.families)) < len(self.families)
        return problems + broken_rules(
            self,
            "",
            (twice, "columns", "has a heading twice", "give each quantity its own"),
            (repeated, "families", "names a family twice", "name each once"),
        )

    def _number_problems(self) -> list[Problem]:
        samples = self.bootstrap_samples
        wrong = [budget for budget in self.budgets if not 0 < budget < math.inf]
        few = f"is neither 0 nor {_LEAST_SAMPLES} or more"
        tolerance = "is not in [0, 0.5]"
        return [
            *(Problem("budgets", b, "is not above 0", "give training FLOPs") for b in wrong),
            *broken_rules(
                self,
                "",
                (not 0 < self.level < 1, "level", "is not in (0, 1)", "0.9 and 0.95 are usual"),
                (samples < _LEAST_SAMPLES and samples != 0, "bootstrap_samples", few, "use 200"),
                (
                    not 0 <= self.budget_tolerance <= 0.5,
                    *("budget_tolerance", tolerance, "use 0.02"),
                ),
            ),
        ]
