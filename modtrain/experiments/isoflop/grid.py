"""The points of an isoFLOP grid: each a run with its shape, rates and plan. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from modtrain.common.errors import ConfigError, Problem, raise_if_any
from modtrain.experiments.controls import UNROUTED, without_inert_settings
from modtrain.experiments.isoflop.config import IsoflopConfig
from modtrain.experiments.isoflop.shapes import Shape, ShapeRule
from modtrain.experiments.sweep.jobs import SweepJob, job_name, overrides_between
from modtrain.models.config import ModelConfig, unrouted_layers
from modtrain.training.config import BudgetConfig, TrainConfig
from modtrain.training.plan import TrainingPlan, derive, resolve
from modtrain.training.schedule_config import CapacityScheduleConfig


@dataclass(frozen=True, eq=False)
class Point:
    """One run of the grid.

    size: training FLOPs a token over those of the estimated optimum, as asked for. target: these
    FLOPs; None for a control, which has the shape of its family's point. resolved: ``config`` with
    the vocabulary and the sequence length of the data.
    """

    family: str
    budget: float
    size: float
    target: float | None
    config: TrainConfig
    resolved: TrainConfig
    plan: TrainingPlan
    job: SweepJob

    @property
    def seed(self) -> int:
        """The seed of the weights."""
        return self.config.seed

    @property
    def trunk(self) -> str | None:
        """The run whose first steps this point shares; None: it has all its steps for itself."""
        return self.config.branch.run

    @property
    def own_flops(self) -> float:
        """Training FLOPs that are executed for this point alone."""
        return self.plan.flops - self.plan.flops_until(self.config.branch.step or 0)


@dataclass(frozen=True, eq=False)
class Trunk:
    """A run whose steps several points have in common; it is no point itself."""

    family: str
    config: TrainConfig
    resolved: TrainConfig
    plan: TrainingPlan
    job: SweepJob

    @property
    def own_flops(self) -> float:
        """Training FLOPs that are executed."""
        return self.plan.flops


@dataclass
class Grid:
    """The points in the order in which they are trained, and what a reader should know of them.

    optima: family → budget → training FLOPs a token of the estimated optimum. trunks: trained
    before the points.
    """

    config: IsoflopConfig
    points: list[Point]
    optima: dict[str, dict[float, float]]
    notes: list[str] = field(default_factory=list)
    trunks: list[Trunk] = field(default_factory=list)


def optimal_flops_per_token(budget: float, tokens_per_parameter: float) -> float:
    """Return F at which D / N is ``tokens_per_parameter``, with N = F / 6 and D = budget / F."""
    return 6 * math.sqrt(budget / (6 * tokens_per_parameter))


def make_grid(
    config: IsoflopConfig, families: Mapping[str, TrainConfig], defaults: TrainConfig
) -> Grid:
    """Return the grid.

    families: the configuration that the points of each family share. defaults: the training
    configuration without overrides.

    Raises:
        ConfigError: everything wrong with any family or point, keys prefixed by the family's name.
    """
    grid, problems = Grid(config, [], {}), []
    for name, base in families.items():
        try:
            family = _Family(config, name, base, defaults)
            points, controls = family.points()
        except ConfigError as error:
            problems += [replace(p, key=f"{name}: {p.key}") for p in error.problems]
            continue
        grid.optima[name] = {budget: family.optimum(budget) for budget in config.budgets}
        grid.points += points
        if config.controls and family.is_routed:
            _add_controls(grid, name, controls)
    raise_if_any(problems)
    if config.only:
        grid.points = [point for point in grid.points if point.family in config.only]
        if not grid.points:
            reason, remedy = "leaves no point of the grid", "name other families"
            raise ConfigError([Problem("only", config.only, reason, remedy)])
    # Cheap ones first, and each budget whole before the next; all of a seed before the next seed.
    seeds = {seed: number for number, seed in enumerate(config.seeds)}
    grid.points.sort(key=lambda p: (seeds.get(p.seed, 0), p.budget))
    return grid


def _add_controls(grid: Grid, family: str, controls: list[Point]) -> None:
    """Add a family's controls, unless it has none or another family has the same."""
    name = family + UNROUTED
    if not controls:
        grid.notes.append(f"{family} has no control: it has no whole layers that are not routed")
        return
    runs = list(map(_as_trained, controls))
    for other in dict.fromkeys(point.family for point in grid.points):
        if [_as_trained(p) for p in grid.points if p.family == other] == runs:
            grid.notes.append(f"{name} is {other}: it is trained once, as {other}")
            return
    grid.points += controls


def _as_trained(point: Point) -> TrainConfig:
    """Return what tells two points apart."""
    return replace(without_inert_settings(point.config), name=None)


class _Family:
    """The rules of the grid, for one family."""

    def __init__(
        self, config: IsoflopConfig, name: str, base: TrainConfig, defaults: TrainConfig
    ) -> None:
        self.config, self.name, self.base, self.defaults = config, name, base, defaults
        # Any budget: what depends on the data is the same for all.
        late = [group.start_step for group in base.optimizer.groups]
        any_budget = BudgetConfig(steps=1 + max(late, default=0))
        resolved, plan = resolve(replace(base, budget=any_budget), needs_data=False)
        self.model, self.seq_len = resolved.model, plan.seq_len
        self.eos_id = resolved.data.eos_id
        self.unit = plan.seq_len * base.batch.micro_batch_size * plan.dims.data_parallel
        self.dims = plan.dims
        self.shapes = ShapeRule(config.shape, self.model, self.seq_len)
        raise_if_any(self.shapes.problems())

    @property
    def is_routed(self) -> bool:
        """Whether the family has routed layers."""
        return self.model.is_routed

    def optimum(self, budget: float) -> float:
        """Training FLOPs a token of the estimated optimum."""
        ratios = self.config.tokens_per_parameter_of
        ratio = ratios.get(self.name, self.config.tokens_per_parameter)
        return optimal_flops_per_token(budget, ratio)

    def points(self) -> tuple[list[Point], list[Point]]:
        """Return the family's points, and those of its controls.

        Raises:
            ConfigError: a size has no shape, two sizes have the same, or a run cannot be planned.
        """
        points, controls, problems = [], [], []
        seeds: Sequence[int | None] = self.config.seeds or [None]
        for budget in self.config.budgets:
            shapes, wrong = self._shapes(budget)
            problems += wrong
            for size, shape in shapes.items():
                target = self.optimum(budget) * size
                for seed in seeds:
                    try:
                        points.append(self._point(budget, size, seed, shape.model, target))
                        control = unrouted_layers(shape.model)
                        if control is not None:
                            controls.append(self._point(budget, size, seed, control, None))
                    except ConfigError as error:
                        problems += error.problems
        raise_if_any(list(dict.fromkeys(problems)))
        return points, controls

    def _shapes(self, budget: float) -> tuple[dict[float, Shape], list[Problem]]:
        """Return the shape of each size, and the sizes that have none of their own."""
        shapes: dict[float, Shape] = {}
        problems = []
        for size in sorted(self.config.sizes):
            shape = self.shapes.nearest(self.optimum(budget) * size)
            if shape is None:
                reason = "no shape is allowed"
                remedy = "widen shape.aspect_min and shape.aspect_max, or narrow the heads"
                return {}, [Problem("shape", "", reason, remedy)]
            twin = next((s for s, other in shapes.items() if other.model == shape.model), None)
            if twin is None:
                shapes[size] = shape
                continue
            model = shape.model
            reason = (
                f"has at {budget:g} FLOPs the same shape as {twin:g}: {model.num_layers} layers of"
                f" width {model.d_model}, {shape.flops_per_token:.3g} FLOPs a token"
            )
            remedy = (
                "leave one out, give a larger budget, narrower heads (model.num_heads), or a"
                " wider range of shape.aspect_min to shape.aspect_max"
            )
            problems.append(Problem("sizes", size, reason, remedy))
        return shapes, problems

    def _point(
        self, budget: float, size: float, seed: int | None, model: ModelConfig, target: float | None
    ) -> Point:
        family = self.name if target is not None else self.name + UNROUTED
        labels = {"family": family, "budget": f"{budget:g}", "size": f"{size:g}"}
        labels |= {} if seed is None else {"seed": str(seed)}
        config = self._run(family, budget, model, job_name(labels), seed)
        data = replace(config.data, seq_len=self.seq_len, eos_id=self.eos_id)
        resolved = replace(config, model=model, data=data)
        values = {
            "model.d_model": str(model.d_model),
            "model.num_layers": str(model.num_layers),
            "optimizer.lr": str(config.optimizer.lr),
            "batch.tokens": str(config.batch.tokens),
        }
        job = SweepJob(job_name(labels), labels | values, overrides_between(self.defaults, config))
        plan = derive(resolved, self.dims)
        return Point(family, budget, size, target, config, resolved, plan, job)

    def _run(
        self, family: str, budget: float, model: ModelConfig, job: str, seed: int | None
    ) -> TrainConfig:
        base = self.base
        lr, muon = base.optimizer.lr, base.optimizer.muon
        factor = self._lr_factor(family, model.d_model)
        if muon.lr is not None:
            muon = replace(muon, lr=_rounded(muon.lr * factor))
        schedule = base.capacity_schedule if model.is_routed else CapacityScheduleConfig()
        return replace(
            base,
            name=f"{self.config.name}/{job}",
            seed=base.seed if seed is None else seed,
            data=base.data if seed is None else replace(base.data, seed=seed),
            # As the data says, unless it is configured.
            model=replace(model, vocab_size=base.model.vocab_size),
            budget=BudgetConfig(flops=budget),
            batch=replace(base.batch, tokens=self._batch_tokens(budget)),
            optimizer=replace(base.optimizer, lr=_rounded(lr * factor), muon=muon),
            capacity_schedule=schedule,
        )

    def _lr_factor(self, family: str, d_model: int) -> float:
        rule = self.config.lr_rule
        return float((d_model / rule.width) ** -rule.exponent * rule.factors.get(family, 1.0))

    def _batch_tokens(self, budget: float) -> int:
        rule = self.config.batch_rule
        tokens = self.base.batch.tokens * (budget / rule.budget) ** rule.exponent
        return int(max(1, round(tokens / self.unit)) * self.unit)


def _rounded(rate: float) -> float:
    """Return a rate as a person would write it, to four digits."""
    return float(f"{rate:.4g}")
