"""What follows from a configuration and its data: steps, accumulation, stages, FLOPs.

Imports no torch: `modtrain plan` and the checks before a run are fast.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

from modtrain.common.errors import ConfigError, DataError, Problem, raise_if_any
from modtrain.data.config import DataConfig
from modtrain.data.mixture.usage import mixture_usage, usage_problems
from modtrain.data.stream.prepared import IndexSummary
from modtrain.distributed.launch import Launch
from modtrain.models.depth.pattern import PATTERNS
from modtrain.models.flops import forward_flops, training_flops_per_token
from modtrain.optimizers.config import OptimizerConfig
from modtrain.optimizers.parameter_groups import pattern_problems
from modtrain.parallel.config import LayerOptions, StrategyOptions, dims_of, expected_launch
from modtrain.parallel.dims import ParallelDims
from modtrain.parallel.validation import dims_problems
from modtrain.training.config import BudgetConfig, TrainConfig
from modtrain.training.schedules import CapacityStage, capacity_stages

_ONE_PROCESS = ParallelDims()


@dataclass(frozen=True)
class TrainingPlan:
    """The derived quantities of a run.

    seq_len: tokens a sequence. sequences_per_step: over all devices and accumulation.
    accumulate: micro-batches a step on each device. stages: contiguous, from step 0 to the last; a
    run without a capacity schedule has one. dims: the processes.
    """

    seq_len: int
    sequences_per_step: int
    accumulate: int
    stages: tuple[CapacityStage, ...]
    dims: ParallelDims = _ONE_PROCESS

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.stages[-1].stop

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step learns from."""
        return self.sequences_per_step * self.seq_len

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.tokens_per_step

    @property
    def flops_per_token(self) -> float:
        """Executed training FLOPs a token, the mean over the run."""
        return self.flops / self.tokens

    @property
    def flops(self) -> float:
        """Executed training FLOPs of the whole run."""
        return self.flops_until(self.steps)

    def capacities_at(self, step: int) -> tuple[float | None, ...]:
        """Capacities of all layers in step ``step``, counted from 0; None: not routed.

        Raises:
            ValueError: the run has no such step.
        """
        for stage in self.stages:
            if stage.first <= step < stage.stop:
                return stage.capacities
        raise ValueError(f"step {step} is not one of the {self.steps} of the run")

    def flops_until(self, step: int) -> float:
        """Executed training FLOPs of the first ``step`` optimizer steps.

        Raises:
            ValueError: the run has fewer steps.
        """
        if not 0 <= step <= self.steps:
            raise ValueError(f"{step} is not in [0, {self.steps}], the steps of the run")
        per_token = sum(
            stage.flops_per_token * (min(step, stage.stop) - stage.first)
            for stage in self.stages
            if stage.first < step
        )
        return float(per_token * self.tokens_per_step)


def resolve(
    config: TrainConfig, needs_data: bool = True, launch: Launch | None = None
) -> tuple[TrainConfig, TrainingPlan]:
    """Resolve what depends on the data and the processes, and derive the plan.

    Returns the configuration with ``model.vocab_size`` and ``data.seq_len`` set, with
    ``data.document_mask`` also ``data.eos_id``, a budget of epochs as one of tokens; and its plan.
    ``needs_data=False`` needs no prepared data if the configuration suffices, and ignores what does
    not fit the prepared data: `data_mismatches` finds it.
    launch: the processes; None: as many as the configuration plans for.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    by_part = config.problems_by_part(needs_name=False)
    problems = [problem for part in by_part.values() for problem in part]
    summary = prepared_summary(config.data)
    if needs_data:
        problems += data_mismatches(config)
        if summary is None:
            raise_if_any(problems)
    problems += [] if summary is not None else _unprepared(config)
    problems += _epochs_problems(config)
    seq_len = _sequence_length(config, summary, needs_data)
    launch = expected_launch(config.strategy, Launch()) if launch is None else launch
    dims = _ONE_PROCESS
    if not by_part["strategy"] and not by_part["model"]:
        misfits = dims_problems(config.strategy, "strategy", config.model, launch)
        dims = _ONE_PROCESS if misfits else dims_of(config.strategy, config.model, launch)
        problems += misfits
    if seq_len > 0:
        problems += _batch_problems(config, seq_len, dims.data_parallel)
        problems += [] if by_part["model"] else _capacity_problems(config, seq_len)
    raise_if_any(problems)
    vocab_size, eos_id = config.model.vocab_size, config.data.eos_id
    if summary is not None:
        vocab_size = vocab_size or summary.vocab_size
        if config.data.document_mask and eos_id is None:
            eos_id = summary.eos_id
    resolved = replace(
        config,
        model=replace(config.model, vocab_size=vocab_size),
        data=replace(config.data, seq_len=seq_len, eos_id=eos_id),
    )
    raise_if_any(pattern_problems(resolved.model, resolved.optimizer, "optimizer"))
    if config.budget.epochs is not None and summary is not None:
        resolved = replace(resolved, budget=_in_tokens(resolved, summary.num_samples(seq_len)))
    plan = derive(resolved, dims)
    is_mixture = resolved.data.sources and summary is not None
    # With data that do not fit, `plan` warns and goes on.
    if is_mixture and (needs_data or not data_mismatches(config)):
        raise_if_any(_mixture_problems(resolved.data, plan))
    return resolved, plan


def derive(config: TrainConfig, dims: ParallelDims = _ONE_PROCESS) -> TrainingPlan:
    """Derive the plan of a resolved configuration.

    Raises:
        ConfigError: the budget is less than one step, or a schedule does not reach its end.
    """
    seq_len = config.data.seq_len
    if seq_len is None:
        raise ValueError("data.seq_len is not resolved")
    if config.budget.epochs is not None:
        raise ValueError("budget.epochs is not resolved")
    sequences = config.batch.tokens // seq_len
    tokens_per_step = sequences * seq_len
    costs = _Costs(config, seq_len)
    budget = config.budget
    if budget.steps is not None:
        steps = budget.steps
    elif budget.tokens is not None:
        steps = round(budget.tokens / tokens_per_step)
    else:
        steps = costs.nearest_steps((budget.flops or 0) / tokens_per_step)
    if steps < 1:
        name, value = ("tokens", budget.tokens) if budget.tokens else ("flops", budget.flops)
        need = tokens_per_step if budget.tokens else costs.total(1) * tokens_per_step
        reason = f"is less than one step, which takes {need:.3g}"
        remedy = "give more, or lower batch.tokens"
        raise ConfigError([Problem(f"budget.{name}", value, reason, remedy)])
    accumulate = sequences // (config.batch.micro_batch_size * dims.data_parallel)
    raise_if_any(_late_groups(config.optimizer, steps))
    stages = costs.stages(steps)
    if stages[-1].capacities != tuple(costs.final):
        reason = f"leaves none of the {steps} steps with the model's own capacities"
        key, remedy = "capacity_schedule.end", "lower it, or train longer"
        raise ConfigError([Problem(key, config.capacity_schedule.end, reason, remedy)])
    return TrainingPlan(seq_len, sequences, accumulate, stages, dims)


def _late_groups(config: OptimizerConfig, steps: int) -> list[Problem]:
    late = [group.start_step for group in config.groups if group.start_step >= steps]
    reason = f"is not before the run's end, after {steps} steps"
    remedy = "lower it, or freeze these parameters with optimizer.train"
    return [Problem("optimizer.groups", f"start_step={step}", reason, remedy) for step in late[:1]]


def _in_tokens(config: TrainConfig, num_samples: int) -> BudgetConfig:
    """Return a budget of epochs as the tokens of the nearest number of steps.

    config: resolved. num_samples: of an epoch.

    Raises:
        ConfigError: that is less than one step.
    """
    seq_len, epochs = config.data.seq_len or 1, config.budget.epochs or 0.0
    sequences = config.batch.tokens // seq_len
    steps = round(epochs * num_samples / sequences)
    if steps < 1:
        reason = f"is less than one step, which takes {sequences / max(1, num_samples):.3g}"
        remedy = "give more, or lower batch.tokens"
        raise ConfigError([Problem("budget.epochs", epochs, reason, remedy)])
    return BudgetConfig(tokens=float(steps * sequences * seq_len))


def _epochs_problems(config: TrainConfig) -> list[Problem]:
    """Find a budget of epochs of a mixture, each source of which has its own."""
    if config.budget.epochs is None or not config.data.sources:
        return []
    reason = "has no meaning for a mixture: each source has epochs of its own"
    remedy = "write budget.tokens=N, and data.sources.NAME.max_epochs to bound a source"
    return [Problem("budget.epochs", config.budget.epochs, reason, remedy)]


class _Costs:
    """The cost of runs of any length, in FLOPs for each token of a step."""

    def __init__(self, config: TrainConfig, seq_len: int) -> None:
        self.config, self.final = config, config.model.capacities
        self._per_token = cache(partial(training_flops_per_token, config.model, seq_len))

    def stages(self, steps: int) -> tuple[CapacityStage, ...]:
        """Return the stages of a run of ``steps`` steps."""
        stages = capacity_stages(self.config.capacity_schedule, self.final, steps)
        return tuple(replace(s, flops_per_token=self._per_token(s.capacities)) for s in stages)

    def total(self, steps: int) -> float:
        """Return the sum over a run of ``steps`` steps."""
        return sum(stage.flops_per_token * stage.num_steps for stage in self.stages(steps))

    def nearest_steps(self, budget: float) -> int:
        """Return the number of steps whose total is nearest to ``budget``; it may be 0.

        The stages stretch with the run: in a run one step longer each begins at the same step or
        one later. So the total rises with every step, and bisection finds the budget.
        """
        too_many = 1
        while self.total(too_many) <= budget:
            too_many *= 2
        more = bisect_right(range(too_many), budget, key=self.total)
        fewer = more - 1
        return fewer if budget - self.total(fewer) <= self.total(more) - budget else more


def prepared_summary(data: DataConfig) -> IndexSummary | None:
    """Return the summary of the prepared data; None where they are missing or damaged."""
    try:
        return data.summary()
    except DataError:
        return None


def data_mismatches(config: TrainConfig) -> list[Problem]:
    """Find why a run could not read the prepared data, which may be missing."""
    problems = config.data.shard_problems("data")
    summary, size = prepared_summary(config.data), config.model.vocab_size
    if summary is not None and size is not None and size < summary.vocab_size:
        reason = f"is smaller than the tokenizer's {summary.vocab_size}"
        remedy = f"set it to {summary.vocab_size} or more, or to null"
        problems.append(Problem("model.vocab_size", size, reason, remedy))
    return problems


def _mixture_problems(data: DataConfig, plan: TrainingPlan) -> list[Problem]:
    """Find why a run of this length cannot read the mixture, all sources of which are there."""
    usage = mixture_usage(data, plan.seq_len, plan.steps * plan.sequences_per_step)
    return usage_problems(data, usage, "data")


def _unprepared(config: TrainConfig) -> list[Problem]:
    """Find the values that come with prepared data, of which there is none."""
    data, shards = config.data, "comes from the shards, which do not exist yet"
    reasons: dict[str, str] = {}
    extra: list[Problem] = []
    if config.model.vocab_size is None:
        reason = f"comes from the tokenizer, but there is no prepared data in {data.location}"
        reasons["model.vocab_size"] = reason
    if data.seq_len is None:
        reasons["data.seq_len"] = shards
    if config.budget.epochs is not None:
        reason = f"counts the prepared data, and there is none in {data.location}"
        remedy = "run modtrain prepare first, or give budget.tokens"
        extra = [Problem("budget.epochs", config.budget.epochs, reason, remedy)]
    if data.document_mask and data.eos_id is None:
        reasons["data.eos_id"] = f"{shards}, and data.document_mask needs it"
    return extra + [
        Problem(key, "null", reason, f"run modtrain prepare first, or set {key}")
        for key, reason in reasons.items()
    ]


def _sequence_length(config: TrainConfig, summary: IndexSummary | None, needs_data: bool) -> int:
    """Return the tokens of a sequence; 0 where they are not known or do not fit the shards."""
    length = config.data.seq_len
    if summary is None or length is None:
        return length or (summary.seq_len if summary else 0)
    # A run with a length that does not fit the shards is refused by the data's own problems.
    is_read = length > 0 and summary.seq_len % length == 0
    return length if is_read or not needs_data else 0


def _capacity_problems(config: TrainConfig, seq_len: int) -> list[Problem]:
    """Find capacities that round to no token; those between two of a schedule never do."""
    model, schedule = config.model, config.capacity_schedule
    final = model.capacities
    is_named = isinstance(model.pattern, str) and model.pattern in PATTERNS
    key, value = (
        ("model.capacity", model.capacity) if is_named else ("model.pattern", model.pattern)
    )
    problems = _no_token_problems(final, seq_len, key, value)
    if schedule.name != "constant" and schedule.start > 0:
        start = [None if share is None else schedule.start for share in final]
        problems += _no_token_problems(start, seq_len, "capacity_schedule.start", schedule.start)
    return problems


def _no_token_problems(
    capacities: Sequence[float | None], seq_len: int, key: str, value: object
) -> list[Problem]:
    empty: dict[float, list[str]] = {}
    for layer, share in enumerate(capacities):
        if share is not None and round(share * seq_len) < 1:
            empty.setdefault(share, []).append(str(layer))
    return [
        Problem(
            key,
            value,
            f"leaves layer{'s' * (len(layers) > 1)} {', '.join(layers)} no token of a sequence:"
            f" k = round({share:g} x {seq_len}) = 0",
            f"use {1 / seq_len:.2g} or more, which is one token, or longer sequences",
        )
        for share, layers in empty.items()
    ]


def _batch_problems(config: TrainConfig, seq_len: int, data_parallel: int) -> list[Problem]:
    tokens, micro = config.batch.tokens, config.batch.micro_batch_size
    unit = seq_len * micro * data_parallel
    if min(tokens, micro) < 1 or tokens % unit == 0:
        return []
    remedy = f"use {max(unit, round(tokens / unit) * unit)}, or another batch.micro_batch_size"
    reason = (
        "is not a multiple of seq_len x micro_batch_size x data-parallel ranks ="
        f" {seq_len} x {micro} x {data_parallel} = {unit}"
    )
    return [Problem("batch.tokens", tokens, reason, remedy)]


def forward_flops_per_token(config: TrainConfig) -> float:
    """Return the executed FLOPs of a run's forward pass per token."""
    seq_len = config.data.seq_len or 1
    return forward_flops(config.model, seq_len).total / seq_len


def strategy_options(config: TrainConfig, plan: TrainingPlan) -> StrategyOptions:
    """Return the options of a run's strategy."""
    mode, num_stages = config.strategy.activation_checkpointing, len(plan.stages)
    layers = LayerOptions(config.precision, mode, config.compile, num_stages)
    return StrategyOptions(config.strategy, plan.dims, layers)
