"""Typed configuration of a search over depth patterns. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, one_of, shares
from modtrain.experiments.trunk_rules import init_problems, trunk_problems
from modtrain.models.depth.pattern import pattern_problems
from modtrain.training.config import TrainConfig

PARAMETRIZATIONS = ("monotone", "symmetric", "free")
BEST = ("lowest_loss", "cheapest")


@dataclass
class PatternSearchConfig(TrainConfig):
    """Runs that share everything but the capacity of each layer, and of which fewer train longer.

    Each candidate is trained for the first budget. Those that are best in loss and forward FLOPs
    continue to the next one, from where they are: successive halving (arXiv 1502.07943) with two
    objectives. ``model.pattern`` itself is not used.

    budgets: training FLOPs of a candidate, executed, by the end of each rung; rising.
    num_drawn: number of patterns that are drawn, beside those of ``patterns``.
    patterns: candidates that are given: names, at ``model.capacity``, or lists of capacities, as
        for ``model.pattern``.
    parametrizations: what patterns are drawn from, in turn. ``monotone``: capacities that fall, or
        rise, over the layers. ``symmetric``: the second half mirrors the first. ``free``: each
        layer has one of ``levels``.
    knots: values between which the capacities of ``monotone`` and ``symmetric`` are interpolated.
    capacity_min: lowest capacity of a knot; the others are uniform in the logarithm up to 1.
    dense_share: share of the knots that are 1, before the draw is fitted to its FLOPs.
    levels: capacities of ``free``; 1 is a dense layer.
    flops_min, flops_max: limits of a candidate's forward FLOPs, over those of the dense model.
        Draws are spread evenly between them.
    sampler_seed: of the draws. With another ``num_drawn`` the first ones stay the same.
    keep: share of a rung's candidates that continue to the next, at least one.
    best: which candidate of the last rung becomes the configuration file. ``lowest_loss``.
        ``cheapest``: the one with the fewest forward FLOPs whose loss is within ``best_within``.
    best_within: by how much, relative to the lowest loss.
    controls: train at the last budget, to compare with, the dense model, and the dense model of the
        best candidate's unrouted layers alone.
    output: file of the best candidate's configuration; null: ``conf/experiment/best.yaml`` in the
        search's directory.
    plan_only: print what would be trained, and train nothing.
    """

    budgets: list[float] = field(default_factory=list)
    num_drawn: int = 27
    patterns: list[Any] = field(
        default_factory=lambda: ["every_other", "all_but_ends", "cosine", "u_shape", "ramp_down"]
    )
    parametrizations: list[str] = field(default_factory=lambda: list(PARAMETRIZATIONS))
    knots: int = 4
    capacity_min: float = 0.0625
    dense_share: float = 0.25
    levels: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.5, 1.0])
    flops_min: float = 0.0
    flops_max: float = 1.0
    sampler_seed: int = 0
    keep: float = 0.5
    best: str = "lowest_loss"
    best_within: float = 0.005
    controls: bool = True
    output: str | None = None
    plan_only: bool = False

    @property
    def directory(self) -> Path:
        """Where the runs and the results are."""
        return Path(self.runs_dir) / str(self.name)

    @property
    def output_path(self) -> Path:
        """The file of the best candidate's configuration."""
        if self.output is not None:
            return Path(self.output)
        return self.directory / "conf" / "experiment" / "best.yaml"

    def problems_by_part(self, needs_name: bool = True) -> dict[str, list[Problem]]:
        """Everything wrong with the search, and with what its candidates share."""
        parts = super().problems_by_part(needs_name)
        given = {key: value for key, value in vars(self.budget).items() if value is not None}
        reason, remedy = "is each rung's own", "list the budgets: budgets=[1e12, 3e12]"
        parts["budget"] = [Problem(f"budget.{key}", v, reason, remedy) for key, v in given.items()]
        if self.branch.run is not None:
            reason, remedy = "is each candidate's own", "leave it out"
            parts["branch"] = [Problem("branch.run", self.branch.run, reason, remedy)]
        parts["init"] = init_problems(self, "cannot be a candidate's: each continues from its own")
        reason = "differs between the budgets of a candidate, which continues from one to the next"
        parts["rungs"] = [*self._budget_problems(), *trunk_problems(self, reason)]
        sizes_are_wrong = bool(parts["model"])
        return parts | {"candidates": self._candidate_problems(sizes_are_wrong)}

    def _budget_problems(self) -> list[Problem]:
        key, example = "budgets", "budgets=[1e12, 3e12, 1e13]"
        if not self.budgets:
            return [Problem(key, "", "is empty", f"give some: {example}")]
        problems = [
            Problem(f"{key}.{number}", value, "is not above 0", "give a positive number")
            for number, value in enumerate(self.budgets)
            if not 0 < value < float("inf")
        ]
        if any(before >= after for before, after in pairwise(self.budgets)):
            problems.append(Problem(key, self.budgets, "does not rise", f"sort it: {example}"))
        if not 0 < self.keep <= 1:
            reason, remedy = "is not a share in (0, 1]", "keep=0.5 halves the candidates"
            problems.append(Problem("keep", self.keep, reason, remedy))
        problems += one_of(self, "", "best", BEST) + shares(self, "", "best_within")
        if self.output is not None and Path(self.output).suffix != ".yaml":
            reason, remedy = "is not a YAML file", "write output=conf/experiment/mine.yaml"
            problems.append(Problem("output", self.output, reason, remedy))
        return problems

    def _candidate_problems(self, sizes_are_wrong: bool) -> list[Problem]:
        problems = [
            *at_least(self, "", 0, "num_drawn", "flops_min", "sampler_seed"),
            *at_least(self, "", 2, "knots"),
            *above_zero(self, "", "flops_max"),
            *shares(self, "", "dense_share"),
            *one_of(self, "", "parametrizations", PARAMETRIZATIONS),
            *self._level_problems(),
            *([] if sizes_are_wrong else self._given_problems()),
        ]
        if self.flops_min >= self.flops_max > 0:
            reason = f"is not below flops_max={self.flops_max}"
            problems.append(Problem("flops_min", self.flops_min, reason, "lower it"))
        if self.num_drawn and not self.parametrizations:
            reason, remedy = "is empty", "name some, or set num_drawn=0"
            problems.append(Problem("parametrizations", "", reason, remedy))
        if not self.num_drawn and not self.patterns:
            reason, remedy = "leaves no candidate: patterns is empty", "draw some, or give patterns"
            problems.append(Problem("num_drawn", 0, reason, remedy))
        return problems

    def _level_problems(self) -> list[Problem]:
        reason, remedy = "is not a share of the tokens in (0, 1]", "1 is a dense layer"
        problems = [
            Problem("levels", level, reason, remedy) for level in self.levels if not 0 < level <= 1
        ]
        if len(set(self.levels)) < 2:
            reason, remedy = "has fewer than two capacities", "levels=[0.125, 0.25, 0.5, 1]"
            problems.append(Problem("levels", self.levels, reason, remedy))
        if not 0 < self.capacity_min < 1:
            reason, remedy = "is not a share of the tokens in (0, 1)", "try 0.0625"
            problems.append(Problem("capacity_min", self.capacity_min, reason, remedy))
        return problems

    def _given_problems(self) -> list[Problem]:
        """Find what is no pattern of this model, or is one of the controls."""
        problems: list[Problem] = []
        model = self.model
        for pattern in self.patterns:
            wrong = pattern_problems(pattern, model.capacity, model.num_layers, "model")
            problems += [
                Problem("patterns", pattern, problem.reason, problem.remedy)
                for problem in wrong
                if problem.key == "model.pattern"
            ]
        if "dense" in self.patterns:
            remedy = "leave it out: controls=true trains it"
            problems.append(Problem("patterns", "dense", "is a control", remedy))
        return problems
