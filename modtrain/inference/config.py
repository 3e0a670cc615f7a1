"""Configuration of all verbs on trained runs: evaluation, inspection, generation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from modtrain.common.errors import Problem
from modtrain.common.validation import (
    above_zero,
    at_least,
    key_of,
    no_addresses,
    not_empty,
    one_of,
    shares,
)
from modtrain.inference.tasks.config import TaskConfig
from modtrain.inference.text_io import file_problems, output_problems, text_problems
from modtrain.parallel.config import ACCELERATORS
from modtrain.training.config import PRECISIONS


@dataclass
class TrainedRunConfig:
    """Which trained run to load, and how to compute it.

    run: the run's name below ``runs_dir``.
    runs_dir: directory of the runs.
    step: step of the checkpoint; null: the newest.
    data_path: a prepared directory in place of the run's own, made with the same tokenizer; or the
        run's own, where it was moved to.
    accelerator: ``auto`` takes CUDA, then MPS, then the CPU.
    precision: ``auto`` takes bf16 mixed precision where CUDA has it, and fp32 elsewhere.
    """

    run: str | None = None
    runs_dir: str = "runs"
    step: int | None = None
    data_path: str | None = None
    accelerator: str = "auto"
    precision: str = "auto"

    def problems(self) -> list[Problem]:
        """Everything wrong with the settings."""
        return [
            *not_empty(self, "", "run", "add run=my_run"),
            *one_of(self, "", "accelerator", ACCELERATORS),
            *one_of(self, "", "precision", PRECISIONS),
        ]


@dataclass
class ComputeBudgetConfig:
    """The causal decision of a trained model, and how much it computes.

    decision: one of the model's causal decisions; null: the first, in an evaluation all.
    capacity: share of the tokens, in (0, 1], that each router takes: its threshold is set to a
        quantile of its decision values over text of the training split. Routers that ignore content
        take the share itself.
    shift: added to the threshold of all routers, in the units of the decision: the predictor's
        logit (``predictor``), the score (``auxiliary``, where it is a logit, and ``threshold``).
        Above 0 fewer tokens are routed. Cannot be combined with ``capacity``.
    layer_cap: of the first n tokens of a sequence a router takes at most ``floor(layer_cap * n)``.
    step_cap: maximum number of routed parts that a token enters, earlier layers first.
    calibration_sequences: sequences of training text to calibrate ``capacity`` on.
    """

    decision: str | None = None
    capacity: float | None = None
    shift: float = 0.0
    layer_cap: float | None = None
    step_cap: int | None = None
    calibration_sequences: int = 64

    @property
    def overrides(self) -> dict[str, float]:
        """The settings that differ from the model as trained, by key."""
        settings = {
            "capacity": self.capacity,
            "shift": self.shift or None,
            "layer_cap": self.layer_cap,
            "step_cap": self.step_cap,
        }
        return {name: value for name, value in settings.items() if value is not None}

    @property
    def suffix(self) -> str:
        """The part of a result's file name that names the decision and the overrides."""
        parts = [f"{name}_{value}" for name, value in self.overrides.items()]
        return "".join(f"-{part}" for part in [self.decision, *parts] if part)

    def problems(self, prefix: str = "inference") -> list[Problem]:
        """Everything wrong with the settings, except for what depends on the model."""
        remedy = "give a share above 0, up to 1"
        problems = [
            Problem(key_of(prefix, name), value, "is not a share in (0, 1]", remedy)
            for name, value in (("capacity", self.capacity), ("layer_cap", self.layer_cap))
            if value is not None and not 0 < value <= 1
        ]
        problems += at_least(self, prefix, 0, "step_cap")
        problems += at_least(self, prefix, 1, "calibration_sequences")
        if not math.isfinite(self.shift):
            reason, remedy = "is not finite", "give a number; capacity=1 takes every token"
            problems.append(Problem(key_of(prefix, "shift"), self.shift, reason, remedy))
        elif self.shift and self.capacity is not None:
            reason = f"changes the thresholds that {key_of(prefix, 'capacity')} calibrates"
            remedy = "leave one of the two out"
            problems.append(Problem(key_of(prefix, "shift"), self.shift, reason, remedy))
        return problems


@dataclass
class EvalRunConfig(TrainedRunConfig):
    """What a run is evaluated on, and at which compute budget.

    sequences: number of held-out sequences; null: all.
    batch_size: sequences at a time.
    sweep: capacities to calibrate the routers to, in turn; the result is the curve of loss over
        FLOPs instead of an evaluation.
    swap: measure what the routers are worth as well: the loss under other choices of tokens at
        equal capacity, and with the routed updates zeroed.
    tasks: tasks of lm-eval to score the run on, in place of held-out losses; each the name of a
        task, or a .jsonl or .txt file of your own.
    task: how the tasks are run.
    output: directory for the results; null is the run's.
    """

    sequences: int | None = None
    batch_size: int = 16
    tasks: list[str] | None = None
    task: TaskConfig = field(default_factory=TaskConfig)
    inference: ComputeBudgetConfig = field(default_factory=ComputeBudgetConfig)
    sweep: list[float] | None = None
    swap: bool = False
    output: str | None = None

    def problems(self) -> list[Problem]:
        """Everything wrong with the settings."""
        return [
            *super().problems(),
            *at_least(self, "", 1, "sequences", "batch_size"),
            *self.inference.problems(),
            *([] if self.sweep is None else self._sweep_problems(self.sweep)),
            *(self._swap_problems() if self.swap else []),
            *self._task_problems(),
        ]

    def _task_problems(self) -> list[Problem]:
        if self.tasks is None:
            default, reason = vars(TaskConfig()), "has no effect without tasks"
            return [
                Problem(f"task.{name}", value, reason, "set tasks=[...]")
                for name, value in vars(self.task).items()
                if value != default[name]
            ]
        reason, remedy = "is for held-out text", "leave it out; task.limit bounds the examples"
        problems = [
            Problem(name, value, reason, remedy)
            for name, value in (("sequences", self.sequences), ("swap", self.swap or None))
            if value is not None
        ]
        return [
            *not_empty(self, "", "tasks", "name some: tasks=[copy,lookup], or leave it out"),
            *no_addresses(self, "", "tasks"),
            *problems,
            *self.task.problems(),
        ]

    def _swap_problems(self) -> list[Problem]:
        reason = "cannot be combined with swap=true, which keeps the capacity as trained"
        keys: dict[str, object] = {"sweep": self.sweep}
        keys |= {f"inference.{name}": value for name, value in self.inference.overrides.items()}
        return [
            Problem(key, value, reason, "leave one of the two out")
            for key, value in keys.items()
            if value is not None
        ]

    def _sweep_problems(self, sweep: list[float]) -> list[Problem]:
        reasons = [f"has {share}, not in (0, 1]" for share in sweep if not 0 < share <= 1]
        if not sweep:
            reasons.append("is empty")
        if len(set(sweep)) != len(sweep):
            reasons.append("names a capacity twice")
        remedy = "give capacities such as [0.0625, 0.125, 0.25, 1]"
        reason = "cannot be combined with sweep, which sets it for each point"
        return [
            *(Problem("sweep", sweep, reason, remedy) for reason in reasons),
            *(
                Problem(f"inference.{name}", value, reason, "leave one of the two out")
                for name, value in self.inference.overrides.items()
                if name in ("capacity", "shift")
            ),
        ]


@dataclass
class InspectConfig(TrainedRunConfig):
    """What a run's routers are shown, and where the page goes.

    text: a text to show the model, as it is; without ``text`` and ``file``, held-out text.
    file: a UTF-8 text file instead, ``-`` for standard input.
    sequences: held-out sequences; null takes all.
    batch_size: windows computed at a time.
    inference: the decision and how much is computed. As decision ``top_k`` is for models that look
        ahead, and the page then says that it is not causal.
    output: the page; null is ``inspect-<step>….html`` in the run's directory.
    tokens_shown: how many of the tokens are shown one by one; the statistics are of all.
    """

    text: str | None = None
    file: str | None = None
    sequences: int | None = 16
    batch_size: int = 4
    inference: ComputeBudgetConfig = field(default_factory=ComputeBudgetConfig)
    output: str | None = None
    tokens_shown: int = 2000

    def problems(self) -> list[Problem]:
        """Everything wrong with the settings."""
        problems = [
            *super().problems(),
            *at_least(self, "", 1, "sequences", "batch_size", "tokens_shown"),
            *self.inference.problems(),
        ]
        if self.text is not None and self.file is not None:
            reason, remedy = "cannot be combined with text", "leave one of them out"
            problems.append(Problem("file", self.file, reason, remedy))
        elif self.text == "":
            problems.append(Problem("text", "''", "is empty", "give some text, or null"))
        else:
            problems += text_problems("text", self.text) + file_problems("file", self.file)
        return problems + output_problems(self.output)


@dataclass
class SamplingConfig:
    """How a next token is sampled; the settings apply in this order.

    The conventions are those of Hugging Face's ``generate``.

    repetition_penalty: logits of tokens that occur in the text are divided by it if positive,
        multiplied if negative (arXiv 1909.05858, section 4.1); 1: none.
    greedy: take the most likely token; the settings below have no effect then.
    temperature: divisor of the logits.
    top_k: only tokens whose logit is not below the k-th largest; null: all.
    top_p: the fewest tokens, most likely first, whose probabilities sum to this much
        (arXiv 1904.09751); null: all.
    min_p: only tokens with at least this share of the largest probability (arXiv 2407.01082);
        null: all.
    seed: of the random numbers; any integer.
    """

    repetition_penalty: float = 1.0
    greedy: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def problems(self, prefix: str = "") -> list[Problem]:
        """Everything wrong with the settings."""
        problems = [
            *above_zero(self, prefix, "repetition_penalty"),
            *at_least(self, prefix, 1, "top_k"),
            *(shares(self, prefix, "min_p") if self.min_p is not None else []),
        ]
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            greedy = key_of(prefix, "greedy")
            remedy = f"give a positive number, or {greedy}=true for the most likely token"
            key = key_of(prefix, "temperature")
            problems.append(Problem(key, self.temperature, "is not above 0", remedy))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            key, remedy = (key_of(prefix, "top_p"), "give a number above 0, up to 1, or null")
            problems.append(Problem(key, self.top_p, "is not in (0, 1]", remedy))
        return problems


@dataclass
class SpeculateConfig:
    """Self-speculation: the model at a low capacity drafts, the full model verifies.

    tokens: number of tokens to draft at once; null: none.
    capacity: of the routers when drafting, calibrated like ``inference.capacity``; 0 skips every
        routed part.
    """

    tokens: int | None = None
    capacity: float = 0.0

    def problems(self, prefix: str = "") -> list[Problem]:
        """Everything wrong with the settings."""
        problems = [*at_least(self, prefix, 1, "tokens"), *shares(self, prefix, "capacity")]
        if self.capacity and self.tokens is None:
            reason, remedy = "has no effect without drafts", f"set {key_of(prefix, 'tokens')}"
            problems.append(Problem(key_of(prefix, "capacity"), self.capacity, reason, remedy))
        return problems


@dataclass
class GenerateConfig(TrainedRunConfig):
    """Prompts to continue with a trained run, and how.

    prompt: the text to continue; without ``prompt``, ``file`` and ``input`` a new document begins.
    file: a file with the prompt, ``-`` for standard input.
    input: a file of JSON lines with a ``prompt`` each, ``-`` for standard input.
    output: the file to write; null: standard output.
    samples: number of continuations of each prompt.
    max_tokens: maximum number of tokens of each continuation.
    stop: strings that end a continuation, and are left out of it.
    batch_size: number of sequences to run at once.
    prefill_chunk: number of tokens of a prompt to run at once.
    echo: begin with the prompt.
    show_depth: colour or mark each token by the number of routed parts that it entered.
    chat: put each prompt into the model's chat template, as what a user says; of an imported model.
    """

    prompt: str | None = None
    file: str | None = None
    input: str | None = None
    output: str | None = None
    samples: int = 1
    max_tokens: int = 256
    stop: list[str] = field(default_factory=list)
    batch_size: int = 8
    prefill_chunk: int = 2048
    echo: bool = False
    show_depth: bool = False
    chat: bool = False
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    inference: ComputeBudgetConfig = field(default_factory=ComputeBudgetConfig)
    speculate: SpeculateConfig = field(default_factory=SpeculateConfig)

    def problems(self) -> list[Problem]:
        """Everything wrong with the settings."""
        problems = [
            *super().problems(),
            *at_least(self, "", 1, "samples", "max_tokens", "batch_size", "prefill_chunk"),
            *self.sampling.problems("sampling"),
            *self.inference.problems(),
            *self.speculate.problems("speculate"),
        ]
        if "" in self.stop:
            reason, remedy = "has an empty string, which would stop everything", "leave it out"
            problems.append(Problem("stop", self.stop, reason, remedy))
        sources = {"prompt": self.prompt, "file": self.file, "input": self.input}
        given = {name: value for name, value in sources.items() if value is not None}
        reason = f"cannot be combined: {' and '.join(given)} are given"
        return [
            *problems,
            *(Problem(name, given[name], reason, "give one of them") for name in [*given][1:]),
            *text_problems("prompt", self.prompt),
            *file_problems("file", self.file),
            *file_problems("input", self.input),
            *output_problems(self.output),
        ]
