"""Typed configuration of a training run. Imports nothing heavy, so that errors show at once."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from modtrain.common.durations import duration_problems, seconds_of
from modtrain.common.errors import Problem
from modtrain.common.printable import printable
from modtrain.common.validation import above_zero, at_least, one_of
from modtrain.data.config import DataConfig
from modtrain.models.config import ModelConfig
from modtrain.optimizers.config import OptimizerConfig
from modtrain.optimizers.registry import find_problems as optimizer_problems
from modtrain.parallel.config import StrategyConfig
from modtrain.parallel.validation import run_problems
from modtrain.training.schedule_config import CapacityScheduleConfig, ScheduleConfig
from modtrain.training.spikes.config import SpikeConfig
from modtrain.training.start_check.config import StartCheckConfig
from modtrain.training.starting_point.config import InitConfig

ZERO_ROUTERS = ("end", "always", "never")
PRECISIONS = ("auto", "fp32", "bf16")
RESUMES = ("auto", "fresh")

MUTABLE_KEYS = (
    "name",
    "runs_dir",
    "data.path",
    "data.sources.*.path",
    "log",
    "checkpoint",
    "eval",
    "strategy",
    "spike",
    "start_check",
    "batch.micro_batch_size",
    "data.num_workers",
    "data.prefetch_factor",
    "data.verify",
    "data.cache_dir",
    "data.cache_bytes",
    "data.fetch_timeout",
    "resume",
    "max_time",
)
"""Keys that may differ when a run is resumed: they change its weights by rounding only.

``*`` stands for any name.

Runs and data may be moved or renamed: the fingerprint says whether the data are the same.
An exception is the handling of loss spikes: a run that it stopped can resume with another one. The
micro-batch size may not differ if the model's layers depend on the whole micro-batch
(`ModelConfig.depends_on_micro_batch`).
"""


@dataclass
class BudgetConfig:
    """How long to train: exactly one of the four; the others follow from model and data.

    flops: executed training FLOPs, forward and backward. tokens: tokens seen. steps: optimizer
    steps. epochs: passes over the prepared training data; the run records them as tokens. A budget
    of FLOPs, tokens or epochs is rounded to the nearest number of steps.
    """

    flops: float | None = None
    tokens: float | None = None
    steps: int | None = None
    epochs: float | None = None

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the budget."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) == 1:
            return above_zero(self, prefix, *given)
        count = "none is given" if not given else f"{len(given)} are given"
        remedy = (
            f"set one of {prefix}.flops, {prefix}.tokens, {prefix}.steps, {prefix}.epochs and leave"
            " the others null"
        )
        reason = f"{count}; a run has exactly one budget"
        return [Problem(prefix, given or "null", reason, remedy)]


@dataclass
class BatchConfig:
    """How many tokens a step, and how many sequences a micro-batch.

    tokens: tokens an optimizer step, over all devices and accumulation.
    micro_batch_size: sequences in a forward pass on a device; accumulation makes up the rest.
    """

    tokens: int = 16384
    micro_batch_size: int = 8

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the batch that can be checked without data."""
        return at_least(self, prefix, 1, "tokens", "micro_batch_size")


@dataclass
class EvalConfig:
    """Held-out losses in a run.

    every: steps between two evaluations; null: at the end only.
    sequences: held-out sequences; null takes all. The sources of a mixture share them evenly.
    batch_size: sequences at a time.
    zero_routers: when to measure what each routed layer is worth, by the causal loss without its
        updates, an evaluation for each: ``end``: at the last evaluation; ``always``; ``never``.
    """

    every: int | None = 200
    sequences: int | None = 256
    batch_size: int = 16
    zero_routers: str = "end"

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the evaluation."""
        return [
            *at_least(self, prefix, 1, "every", "sequences", "batch_size"),
            *one_of(self, prefix, "zero_routers", ZERO_ROUTERS),
        ]


@dataclass
class CheckpointConfig:
    """When to save; a run also saves at its end and on a signal.

    every: steps between two checkpoints.
    keep_last: how many of the newest stay.
    keep_every: a checkpoint whose step is a multiple of this stays for good; null: none.
    background: train on while the disk writes; it takes a copy of the rank's share of the state in
        the CPU's memory.
    keep_steps: steps at which the run also saves, to stay for good.
    """

    every: int = 200
    keep_last: int = 2
    keep_every: int | None = None
    background: bool = True
    keep_steps: list[int] = field(default_factory=list)

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the checkpoints."""
        problems = at_least(self, prefix, 1, "every", "keep_last", "keep_every")
        if not problems and self.keep_every is not None and self.keep_every % self.every:
            reason = f"is not a multiple of {prefix}.every={self.every}"
            remedy = "choose a multiple, or no checkpoint would be kept"
            problems.append(Problem(f"{prefix}.keep_every", self.keep_every, reason, remedy))
        reason, remedy = "is not a step of a run", "give 1 or more"
        return problems + [
            Problem(f"{prefix}.keep_steps", step, reason, remedy)
            for step in self.keep_steps
            if step < 1
        ]


@dataclass
class BranchConfig:
    """The checkpoint of another run that this run starts from, its trunk.

    The trunk's steps become this run's own: its weights are those of a run that was trained from
    the start with this configuration, to the bit. So both may differ only in what has not come to
    bear by then: the budget, and the part of the schedule that is still ahead.

    run: name of the trunk; null: start from initial weights.
    step: of the trunk's checkpoint.
    """

    run: str | None = None
    step: int | None = None

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the branch that can be checked without the trunk."""
        problems = at_least(self, prefix, 1, "step")
        if (self.run is None) != (self.step is None):
            key = "run" if self.run is None else "step"
            reason = "is missing: a branch has a run and a step"
            problems.append(Problem(f"{prefix}.{key}", "null", reason, "give both, or neither"))
        return problems


@dataclass
class LogConfig:
    """What a run records.

    every: steps between two records.
    tensorboard: event files beside ``metrics.jsonl``.
    csv: ``metrics.csv`` beside it, a row a record, for spreadsheets and pandas.
    wandb: Weights & Biases as well, of the extra ``modtrain[wandb]``; WANDB_MODE=offline keeps the
        records in the run's directory, for ``wandb sync``.
    wandb_project: the project there.
    progress: a bar on a terminal, lines elsewhere.
    """

    every: int = 10
    tensorboard: bool = True
    csv: bool = False
    wandb: bool = False
    wandb_project: str = "modtrain"
    progress: bool = True

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the logging."""
        problems = at_least(self, prefix, 1, "every")
        if self.wandb and find_spec("wandb") is None:
            reason = "needs the package wandb, which is not installed"
            remedy = "pip install 'modtrain[wandb]', or leave it out"
            problems.append(Problem(f"{prefix}.wandb", True, reason, remedy))
        return problems


@dataclass
class TrainConfig:
    """One training run.

    name: its directory under ``runs_dir``; the same name resumes the same run. null: one is made
        of the model and a number, and printed.
    runs_dir: where runs live.
    seed: of the initial weights; the order of the data has ``data.seed``.
    precision: ``auto`` takes bf16 mixed precision where CUDA has it, and fp32 elsewhere.
    compile: ``torch.compile`` of the whole model, in one graph.
    deterministic: torch's deterministic kernels, for bitwise equal runs on CUDA.
    resume: ``auto`` stops where all checkpoints of a run are gone; ``fresh`` starts such a run
        from its first step, with its old records in ``before-<n>/``. Where a checkpoint is left,
        both resume from it.
    max_time: stop after this time with a checkpoint, to be resumed by another start: ``30m``,
        ``1h30m`` or ``00:30:00``, from the start of the command; of a sweep, of each run. null: at
        the end of the budget alone.
    """

    name: str | None = None
    runs_dir: str = "runs"
    seed: int = 0
    precision: str = "auto"
    compile: bool = False
    deterministic: bool = False
    resume: str = "auto"
    max_time: str | None = None
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
    branch: BranchConfig = field(default_factory=BranchConfig)
    init: InitConfig = field(default_factory=InitConfig)
    log: LogConfig = field(default_factory=LogConfig)
    start_check: StartCheckConfig = field(default_factory=StartCheckConfig)

    @property
    def max_seconds(self) -> float | None:
        """The limit of time in seconds; None: there is none."""
        return None if self.max_time is None else seconds_of(self.max_time)

    def problems(self, needs_name: bool = True) -> list[Problem]:
        """Everything wrong with the run that can be checked without its data."""
        return list(chain.from_iterable(self.problems_by_part(needs_name).values()))

    def problems_by_part(self, needs_name: bool = True) -> dict[str, list[Problem]]:
        """The same for each part by itself; ``run`` and ``combination`` have what is left."""
        own = one_of(self, "", "precision", PRECISIONS) + self._resume_problems()
        if not 0 <= self.seed < 2**32:
            own.append(Problem("seed", self.seed, "is not in [0, 2^32)", "give one that is"))
        own += [] if self.max_time is None else duration_problems("max_time", self.max_time)
        own += self.name_problems() if needs_name or self.name is not None else []
        by_part = {
            name: part.problems(name)
            for name, part in vars(self).items()
            if hasattr(part, "problems")
        }
        combination = [
            *optimizer_problems(self.optimizer, "optimizer", self.strategy.stage is not None),
            *run_problems(self.strategy, "strategy", self.compile),
            *self.spike.strategy_problems("spike", self.strategy.name),
            *self._branch_problems(),
            *self._init_problems(),
            *([] if by_part["model"] else self._routing_problems()),
        ]
        return {"run": own, **by_part, "combination": combination}

    def _resume_problems(self) -> list[Problem]:
        by_name = "a run is resumed by its name: name=NAME"
        problems = one_of(self, "", "resume", RESUMES)
        return [replace(problem, remedy=f"{problem.remedy}; {by_name}") for problem in problems]

    def _branch_problems(self) -> list[Problem]:
        """Find a branch that cannot start where its trunk is."""
        run, strategy = self.branch.run, self.strategy
        if run is None:
            return []
        problems = directory_problems("branch.run", run)
        if run == self.name:
            reason, remedy = "is this run itself", "name the run that has the checkpoint"
            problems.append(Problem("branch.run", run, reason, remedy))
        if strategy.stage is not None:
            reason, remedy = "cannot start from another run's checkpoint", "use fsdp"
            problems.append(Problem("strategy.name", strategy.name, reason, remedy))
        return problems

    def _init_problems(self) -> list[Problem]:
        """Find another run whose weights cannot be taken."""
        init = self.init
        if init.run is None:
            return []
        problems = directory_problems("init.run", init.run)
        if init.run == self.name and init.runs_dir in (None, self.runs_dir):
            reason, remedy = "is this run itself", "name the run that has the weights"
            problems.append(Problem("init.run", init.run, reason, remedy))
        if self.branch.run is not None:
            reason = f"cannot be combined with branch.run={self.branch.run}, which has weights too"
            problems.append(Problem("init.run", init.run, reason, "leave one of them out"))
        return problems + init.model_problems("init", self.model, self.capacity_schedule)

    def _routing_problems(self) -> list[Problem]:
        """Find a capacity schedule for a model that routes no layer."""
        name = self.capacity_schedule.name
        if name == "constant" or self.model.is_routed:
            return []
        reason = f"has no layer to change: model.pattern={self.model.pattern} routes none"
        remedy = "use constant, or a pattern such as every_other"
        return [Problem("capacity_schedule.name", name, reason, remedy)]

    def name_problems(self) -> list[Problem]:
        """Everything wrong with the name, also that there is none."""
        if not self.name:
            reason = "a run needs a name: a second start of the same name resumes it"
            return [Problem("name", "null", reason, "add name=my_run")]
        below = self.name.removeprefix(f"{self.runs_dir}/")
        if below != self.name and not Path(self.runs_dir, self.name).is_dir():
            reason, remedy = "begins with runs_dir, below which it is", f"write name={below}"
            return [Problem("name", self.name, reason, remedy)]
        return directory_problems("name", self.name)


@dataclass
class PlanConfig(TrainConfig):
    """What a training run would take.

    conventions: print as well what is counted as a FLOP.
    """

    conventions: bool = False


def directory_problems(key: str, name: str) -> list[Problem]:
    """Find a name of a run that is not a directory below ``runs_dir``."""
    remedy = "use a plain name such as my_run or sweep/my_run"
    # Printed, they would be commands to the terminal.
    if any(unicodedata.category(character) == "Cc" for character in name):
        return [Problem(key, printable(name), "has control characters", remedy)]
    if name.startswith("/") or {"..", ".", ""} & set(name.split("/")):
        return [Problem(key, name, "is not a directory below runs_dir", remedy)]
    return []
