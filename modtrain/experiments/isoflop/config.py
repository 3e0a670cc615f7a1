"""Typed configuration of an isoFLOP grid. Imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, broken_rules, one_of, shares
from modtrain.experiments.controls import UNROUTED
from modtrain.experiments.trunk_rules import init_problems, trunk_problems
from modtrain.training.config import TrainConfig

CONVENTIONS = ("effective", "total", "total_non_embedding", "active", "active_non_embedding")
"""What N counts.

effective: training FLOPs a token / 6. total: all parameters. active: those that a token passes on
average: a routed layer's times its capacity, the experts that compute it. non_embedding: without
the embedding and the output head.
"""

_FAMILY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass
class ShapeConfig:
    """How a number of FLOPs a token becomes a model.

    Of all widths and numbers of layers within these limits the shapes whose training FLOPs a token
    are within ``tolerance`` of the target are looked at, and the one whose aspect is nearest to the
    middle of the range, in the logarithm, is taken; where there is none, the one with the nearest
    FLOPs.

    aspect_min, aspect_max: range of ``d_model / num_layers``.
    width_multiple: widths are multiples of this; null: of a head's width, as ``model`` gives it
        (with fewer heads of keys and values than of queries: of a group of heads).
    layers_multiple: numbers of layers are multiples of this; null: 2 for the pattern
        ``every_other``, else 1, times ``model.experts.every``.
    tolerance: relative difference of the FLOPs a token that does not matter; 0 always takes the
        nearest.
    """

    aspect_min: float = 32.0
    aspect_max: float = 128.0
    width_multiple: int | None = None
    layers_multiple: int | None = None
    tolerance: float = 0.1

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the rule."""
        problems = [
            *above_zero(self, prefix, "aspect_min", "aspect_max"),
            *at_least(self, prefix, 1, "width_multiple", "layers_multiple"),
            *shares(self, prefix, "tolerance"),
        ]
        reason, remedy = f"is above {prefix}.aspect_max={self.aspect_max}", "swap them"
        is_empty = self.aspect_min > self.aspect_max
        return problems + broken_rules(self, prefix, (is_empty, "aspect_min", reason, remedy))


@dataclass
class LearningRateConfig:
    """The learning rate: ``optimizer.lr * (d_model / width) ** -exponent * factor``.

    The default exponent follows from rates by compute, C^-0.125 (arXiv 2401.02954, section 3.1),
    and widths by compute, C^(1/6) at a fixed aspect; ``optimizer.muon.lr`` is scaled alike.

    width: at which ``optimizer.lr`` holds, that of the family if it has one.
    exponent: how fast the rate falls with the width.
    factors: by family, for families whose best rates differ; a family without one has 1.
    """

    width: int = 1024
    exponent: float = 0.75
    factors: dict[str, float] = field(default_factory=dict)

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the rule but the families' names."""
        problems = at_least(self, prefix, 1, "width") + at_least(self, prefix, 0, "exponent")
        return problems + _not_positive(self.factors, f"{prefix}.factors")


@dataclass
class BatchRuleConfig:
    """The tokens a step: ``batch.tokens * (C / budget) ** exponent``, for a budget of C FLOPs.

    They are rounded to a multiple of what ``data.seq_len``, ``batch.micro_batch_size`` and the
    processes need. The default exponent is that of arXiv 2401.02954, section 3.1, whose law gives
    16384 tokens at 3e14 FLOPs.

    budget: at which ``batch.tokens`` holds.
    exponent: how fast the batch grows with the budget.
    """

    budget: float = 3e14
    exponent: float = 0.3271

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the rule."""
        return above_zero(self, prefix, "budget") + at_least(self, prefix, 0, "exponent")


@dataclass
class IsoflopConfig(TrainConfig):
    """A grid of runs: families of models, budgets of training FLOPs, and sizes.

    With F training FLOPs a token (executed ones, the head included), N = F / 6 and D = C / F tokens
    at a budget of C FLOPs, a family's optimum is estimated where D / N is ``tokens_per_parameter``.
    ``sizes`` are relative to it, the same for each family and budget.

    budgets: training FLOPs, executed.
    families: name → overrides of the training configuration, as on the command line.
    controls: train for each routed family the dense models of its unrouted layers alone, at the
        same widths and budgets, as the family ``<name>_unrouted``.
    sizes: F relative to the estimated optimum's.
    tokens_per_parameter: D / N of the estimated optimum.
    tokens_per_parameter_of: the same for some families, by name.
    seeds: each point is trained with every one of these, for its weights and the order of its data;
        empty: once, as ``seed`` and ``data.seed`` say.
    share_trunk: with ``schedule=wsd`` budgets of one shape share a run up to where they decay; it
        needs ``schedule.warmup_steps`` and ``batch_rule.exponent=0``.
    only: families to train, controls included; empty: all of them.
    parameters: what N counts in the points: ``effective`` (F / 6), ``total``, ``active``, and
        ``total_non_embedding``, ``active_non_embedding``, without embedding and head.
    min_steps: a point with fewer steps than this is warned of.
    plan_only: print what would be trained, and train nothing.
    flops_per_second: executed training FLOPs a second, for the hours of the plan.
    gpu: name of a GPU for the hours of the plan, such as H100, at a share ``mfu`` of its bf16 peak.
    mfu: model FLOPs utilization on ``gpu``.
    measure: time some of the models here for the hours of the plan.
    """

    budgets: list[float] = field(default_factory=list)
    families: dict[str, list[str]] = field(default_factory=dict)
    controls: bool = True
    sizes: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0, 4.0])
    tokens_per_parameter: float = 20.0
    tokens_per_parameter_of: dict[str, float] = field(default_factory=dict)
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    lr_rule: LearningRateConfig = field(default_factory=LearningRateConfig)
    batch_rule: BatchRuleConfig = field(default_factory=BatchRuleConfig)
    seeds: list[int] = field(default_factory=list)
    share_trunk: bool = False
    only: list[str] = field(default_factory=list)
    parameters: str = "effective"
    min_steps: int = 200
    plan_only: bool = False
    flops_per_second: float | None = None
    gpu: str | None = None
    mfu: float = 0.4
    measure: bool = False

    @property
    def directory(self) -> Path:
        """Where the runs and their points are."""
        return Path(self.runs_dir) / str(self.name)

    def problems_by_part(self, needs_name: bool = True) -> dict[str, list[Problem]]:
        """Everything wrong with the grid, and with what its points share."""
        parts = super().problems_by_part(needs_name)
        # Each point has a budget of its own.
        given = {key: value for key, value in vars(self.budget).items() if value is not None}
        reason, remedy = "is each point's own", "list the budgets: budgets=[1e13, 3e13]"
        parts["budget"] = [Problem(f"budget.{key}", v, reason, remedy) for key, v in given.items()]
        parts["init"] = init_problems(self, "has one shape, and the points of a grid have several")
        return parts | {"grid": self._grid_problems()}

    def _grid_problems(self) -> list[Problem]:
        problems = [
            *_list_problems("budgets", self.budgets, "budgets=[3e12, 1e13, 3e13]"),
            *_list_problems("sizes", self.sizes, "sizes=[0.25, 0.5, 1, 2, 4]"),
            *self._family_problems(),
            *above_zero(self, "", "tokens_per_parameter", "flops_per_second", "mfu"),
            *one_of(self, "", "parameters", CONVENTIONS),
            *at_least(self, "", 1, "min_steps"),
            *seed_problems(self.seeds),
            *(self._trunk_problems() if self.share_trunk else []),
        ]
        rates = [
            name
            for name, is_given in {
                "flops_per_second": self.flops_per_second is not None,
                "gpu": self.gpu is not None,
                "measure": self.measure,
            }.items()
            if is_given
        ]
        reason, remedy = "more than one gives the hours of the plan", "give one of them"
        if len(rates) > 1:
            problems.append(Problem(rates[0], getattr(self, rates[0]), reason, remedy))
        elif rates and not self.plan_only:
            reason = "is for the hours of the plan"
            problems.append(Problem(rates[0], getattr(self, rates[0]), reason, "add --plan"))
        return problems

    def _trunk_problems(self) -> list[Problem]:
        """Find what would keep budgets of one shape from having their first steps in common."""
        reason = "differs between budgets, which share_trunk=true does not allow"
        problems, exponent = trunk_problems(self, reason), self.batch_rule.exponent
        if exponent != 0:
            remedy = "set batch_rule.exponent=0"
            problems.append(Problem("batch_rule.exponent", exponent, reason, remedy))
        return problems

    def _family_problems(self) -> list[Problem]:
        if not self.families:
            reason = "a grid needs a family of models"
            remedy = """add 'families={dense: ["model.pattern=dense"], mod: []}'"""
            return [Problem("families", "", reason, remedy)]
        reason, remedy = "is not a plain name", "use letters, digits, dots, dashes and underscores"
        problems = [
            Problem("families", name, reason, remedy)
            for name in self.families
            if not _FAMILY.fullmatch(name)
        ]
        taken = [name for name in self.families if name + UNROUTED in self.families]
        reason, remedy = "is the name of a control", "rename it, or set controls=false"
        problems += [
            Problem("families", name + UNROUTED, reason, remedy) for name in taken if self.controls
        ]
        known = {*self.families, *(name + UNROUTED for name in self.families if self.controls)}
        there = f"there are: {', '.join(sorted(known))}"
        for key, names in {
            "only": self.only,
            "tokens_per_parameter_of": self.tokens_per_parameter_of,
            "lr_rule.factors": self.lr_rule.factors,
        }.items():
            problems += [
                Problem(key, name, "is not a family", there) for name in names if name not in known
            ]
        ratios = self.tokens_per_parameter_of
        return problems + _not_positive(ratios, "tokens_per_parameter_of")


def seed_problems(seeds: list[int]) -> list[Problem]:
    """Find seeds that occur twice or are out of range."""
    problems = []
    if len(set(seeds)) != len(seeds):
        problems.append(Problem("seeds", seeds, "names a seed twice", "name each once"))
    reason, remedy = "is not in [0, 2^32)", "give one that is"
    return problems + [
        Problem("seeds", seed, reason, remedy) for seed in seeds if not 0 <= seed < 2**32
    ]


def _list_problems(key: str, values: list[float], example: str) -> list[Problem]:
    if not values:
        return [Problem(key, "", "is empty", f"give some: {example}")]
    problems = _not_positive({str(number): value for number, value in enumerate(values)}, key)
    if len({f"{value:g}" for value in values}) < len(values):
        problems.append(Problem(key, values, "names a value twice", "name each once"))
    return problems


def _not_positive(values: dict[str, float], key: str) -> list[Problem]:
    return [
        Problem(f"{key}.{name}", value, "is not above 0", "give a positive number")
        for name, value in values.items()
        if not 0 < value < float("inf")
    ]
