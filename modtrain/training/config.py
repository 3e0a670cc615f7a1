"""Typed configuration of a training run. Imports nothing heavy, so that mistakes show at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from modtrain.common.errors import Problem
from modtrain.common.validation import at_least, one_of, shares
from modtrain.data.config import DataConfig
from modtrain.models.config import ModelConfig
from modtrain.optimizers.config import OptimizerConfig
from modtrain.optimizers.registry import find_problems as optimizer_problems
from modtrain.parallel.config import StrategyConfig
from modtrain.parallel.validation import run_problems
from modtrain.training.spikes.config import SpikeConfig

SCHEDULES = ("cosine", "linear", "wsd", "constant")
CAPACITY_SCHEDULES = ("constant", "linear", "cosine", "step")
PRECISIONS = ("auto", "fp32", "bf16")

MUTABLE_KEYS = (
    "runs_dir",
    "log",
    "checkpoint",
    "eval",
    "strategy",
    "spike",
    "batch.micro_batch_size",
    "data.num_workers",
    "data.prefetch_factor",
    "data.verify",
)
"""What may differ when a run is started again: nothing here changes its weights but by rounding.

What is done about loss spikes may: a run that stopped at one can go on in another way. The size of
a micro-batch may not where the model makes something of one as a whole (`ModelConfig`'s
``depends_on_micro_batch``).
"""


@dataclass
class BudgetConfig:
    """How long to train; exactly one of the three, the others follow from the model.

    flops: executed training FLOPs, forward and backward. tokens: tokens seen. steps: optimizer
    steps. A budget of FLOPs or tokens is met by the whole number of steps that lies nearest.
    """

    flops: float | None = None
    tokens: float | None = None
    steps: int | None = None

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the budget."""
        given = {
            name: value
            for name in ("flops", "tokens", "steps")
            if (value := getattr(self, name)) is not None
        }
        if len(given) != 1:
            count = "none is given" if not given else f"{len(given)} are given"
            return [
                Problem(
                    prefix,
                    given or "null",
                    f"{count}; a run has exactly one budget",
                    f"set one of {prefix}.flops, {prefix}.tokens, {prefix}.steps"
                    " and leave the others null",
                )
            ]
        name, value = next(iter(given.items()))
        if math.isfinite(value) and value > 0:
            return []
        return [Problem(f"{prefix}.{name}", value, "is not above 0", "give a positive number")]


@dataclass
class BatchConfig:
    """How many tokens a step, and how many sequences at a time.

    tokens: tokens an optimizer step, over all devices and accumulation.
    micro_batch_size: sequences a device takes at once; accumulation makes up the rest.
    """

    tokens: int = 16384
    micro_batch_size: int = 8

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the batch that needs no data to see."""
        return at_least(self, prefix, 1, "tokens", "micro_batch_size")


@dataclass
class ScheduleConfig:
    """The learning rate over the run, whose length is exactly the run's steps.

    name: ``cosine``, ``linear``, ``wsd`` (warm-up, stable, linear decay) or ``constant``.
    warmup: share of the steps over which the rate rises from 0.
    decay: share of the steps over which wsd falls at the end.
    final: the last rate over the highest.
    """

    name: str = "cosine"
    warmup: float = 0.02
    decay: float = 0.2
    final: float = 0.1

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the schedule."""
        found = one_of(self, prefix, "name", SCHEDULES)
        found += shares(self, prefix, "warmup", "decay", "final")
        if not found and self.name == "wsd" and self.warmup + self.decay > 1:
            found.append(
                Problem(
                    f"{prefix}.decay",
                    self.decay,
                    f"and {prefix}.warmup={self.warmup} are more than the run",
                    "let their sum be 1 at most",
                )
            )
        return found


@dataclass
class CapacityScheduleConfig:
    """The capacity of each routed layer over the run: from ``start`` to its own of the pattern.

    name: ``constant``: its own throughout. ``linear``, ``cosine`` (half a cosine): from ``start``
        at ``begin`` to its own at ``end``. ``step``: from one to the other at ``end``.
    start: the first capacity of every routed layer, in (0, 1].
    begin, end: shares of the run's tokens.
    levels: of linear and cosine, how many values a capacity takes, the first and the last included;
        a compiled model is compiled anew ``levels - 1`` times at most.
    """

    name: str = "constant"
    start: float = 1.0
    begin: float = 0.0
    end: float = 0.5
    levels: int = 8

    @property
    def num_levels(self) -> int:
        """How many values a capacity takes over the run."""
        return {"constant": 1, "step": 2}.get(self.name, self.levels)

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the schedule of capacities."""
        found = [
            *one_of(self, prefix, "name", CAPACITY_SCHEDULES),
            *shares(self, prefix, "begin", "end"),
            *at_least(self, prefix, 2, "levels"),
        ]
        if not 0 < self.start <= 1:
            reason = "is not a share of the tokens in (0, 1]"
            found.append(Problem(f"{prefix}.start", self.start, reason, "1 takes all the tokens"))
        if self.begin > self.end:
            reason = f"is after {prefix}.end={self.end}"
            found.append(Problem(f"{prefix}.begin", self.begin, reason, "begin before the end"))
        never = self.end == 1 if self.name == "step" else self.begin == 1
        if not found and never and self.name != "constant":
            key = "end" if self.name == "step" else "begin"
            reason = "leaves no step at the model's own capacities"
            found.append(Problem(f"{prefix}.{key}", 1, reason, "let the change come earlier"))
        return found


@dataclass
class EvalConfig:
    """Held-out losses in a run.

    every: steps between two evaluations; null: at the end only.
    sequences: held-out sequences; null takes all.
    batch_size: sequences at a time.
    """

    every: int | None = 200
    sequences: int | None = 256
    batch_size: int = 16

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the evaluation."""
        return at_least(self, prefix, 1, "every", "sequences", "batch_size")


@dataclass
class CheckpointConfig:
    """When to save; a run also saves at its end and on a signal.

    every: steps between two checkpoints.
    keep_last: how many of the newest stay.
    keep_every: a checkpoint whose step is a multiple of this stays for good; null: none.
    background: train on while the disk writes; it takes a copy of the rank's share of the state in
        the CPU's memory.
    """

    every: int = 200
    keep_last: int = 2
    keep_every: int | None = None
    background: bool = True

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the checkpoints."""
        found = at_least(self, prefix, 1, "every", "keep_last", "keep_every")
        if not found and self.keep_every is not None and self.keep_every % self.every:
            reason = f"is no multiple of {prefix}.every={self.every}"
            remedy = "no checkpoint would fall on it: choose a multiple"
            found.append(Problem(f"{prefix}.keep_every", self.keep_every, reason, remedy))
        return found


@dataclass
class LogConfig:
    """What a run records.

    every: steps between two records.
    tensorboard: event files beside ``metrics.jsonl``.
    progress: a bar on a terminal, lines elsewhere.
    """

    every: int = 10
    tensorboard: bool = True
    progress: bool = True

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the logging."""
        return at_least(self, prefix, 1, "every")


@dataclass
class TrainConfig:
    """One training run.

    name: its directory under ``runs_dir``; the same name resumes the same run.
    runs_dir: where runs live.
    seed: of the initial weights; the order of the data has ``data.seed``.
    precision: ``auto`` takes bf16 mixed precision where CUDA has it, and fp32 elsewhere.
    compile: ``torch.compile`` of the whole model, in one graph.
    deterministic: torch's deterministic kernels, for bitwise equal runs on CUDA.
    """

    name: str | None = None
    runs_dir: str = "runs"
    seed: int = 0
    precision: str = "auto"
    compile: bool = False
    deterministic: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    capacity_schedule: CapacityScheduleConfig = field(default_factory=CapacityScheduleConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def problems(self, needs_name: bool = True) -> list[Problem]:
        """Everything wrong with the run that can be seen without its data."""
        found = one_of(self, "", "precision", PRECISIONS)
        if not 0 <= self.seed < 2**32:
            found.append(Problem("seed", self.seed, "is not in [0, 2^32)", "give one that is"))
        found += self._name_problems() if needs_name or self.name is not None else []
        for part in (
            *("model", "data", "budget", "batch", "optimizer", "schedule"),
            *("capacity_schedule", "strategy", "eval", "checkpoint", "spike", "log"),
        ):
            found += getattr(self, part).problems(part)
        uses_zero = self.strategy.stage is not None
        found += optimizer_problems(self.optimizer, "optimizer", uses_zero)
        found += run_problems(self.strategy, "strategy", self.compile)
        found += self.spike.strategy_problems("spike", self.strategy.name)
        return found + self._routing_problems()

    def _routing_problems(self) -> list[Problem]:
        """Find a schedule of capacities in a model that has none."""
        name = self.capacity_schedule.name
        if name == "constant" or self.model.problems("model") or self.model.is_routed:
            return []
        reason = f"has no layer to change: model.pattern={self.model.pattern} routes none"
        remedy = "use constant, or a pattern such as every_other"
        return [Problem("capacity_schedule.name", name, reason, remedy)]

    def _name_problems(self) -> list[Problem]:
        if not self.name:
            return [
                Problem(
                    "name",
                    "null",
                    "a run needs a name: a second start of the same name resumes it",
                    "add name=my_run",
                )
            ]
        parts = self.name.split("/")
        if self.name.startswith("/") or ".." in parts or "" in parts or "\0" in self.name:
            return [
                Problem(
                    "name",
                    self.name,
                    "is not a directory below runs_dir",
                    "use a plain name such as my_run or sweep/my_run",
                )
            ]
        return []
