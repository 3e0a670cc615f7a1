"""Typed configuration of an evaluation, and of whatever else looks at a trained run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from modtrain.common.errors import Problem
from modtrain.common.validation import at_least, key_of, not_empty, one_of
from modtrain.parallel.config import ACCELERATORS
from modtrain.training.config import PRECISIONS


@dataclass
class TrainedRunConfig:
    """Which run is looked at, and how it is computed.

    run: the run's name below ``runs_dir``.
    runs_dir: where runs live.
    step: which checkpoint; null takes the newest.
    data_path: another prepared directory than the run's own, made with the same tokenizer.
    accelerator: ``auto`` takes CUDA, then MPS, then the CPU.
    precision: ``auto`` takes bf16 mixed precision where CUDA has it, and fp32 elsewhere.
    """

    run: str | None = None
    runs_dir: str = "runs"
    step: int | None = None
    data_path: str | None = None
    accelerator: str = "auto"
    precision: str = "auto"

    def problems(self, prefix: str = "") -> list[Problem]:
        """Everything wrong with the choice of the run."""
        return [
            *not_empty(self, prefix, "run", "add run=my_run"),
            *one_of(self, prefix, "accelerator", ACCELERATORS),
            *one_of(self, prefix, "precision", PRECISIONS),
        ]


@dataclass
class ComputeBudgetConfig:
    """By which causal decision, and how much, a trained model is to compute.

    decision: one of the model's causal decisions; null takes the first, in an evaluation all.
    capacity: share of the tokens, in (0, 1], that each router is to take: its level is put at the
        quantile of what it decides by, over text of the training split. Routers that look at no
        token take the share itself.
    shift: added to the level that what a router decides by has to exceed, for all routers alike, in
        its units: the predictor's logit (``predictor``), the score (``auxiliary``, where it is a
        logit, and ``threshold``). Above 0 fewer tokens take part. Not beside ``capacity``.
    layer_cap: of the first n tokens of a sequence a router takes ``floor(layer_cap * n)`` at most.
    step_cap: routed parts that a token enters at most, the first ones that want it.
    calibration_sequences: sequences of training text that ``capacity`` is calibrated on.
    """

    decision: str | None = None
    capacity: float | None = None
    shift: float = 0.0
    layer_cap: float | None = None
    step_cap: int | None = None
    calibration_sequences: int = 64

    @property
    def asked(self) -> dict[str, float]:
        """What differs from the model as trained, by key; empty where nothing does."""
        found = {
            "capacity": self.capacity,
            "shift": self.shift or None,
            "layer_cap": self.layer_cap,
            "step_cap": self.step_cap,
        }
        return {name: value for name, value in found.items() if value is not None}

    @property
    def suffix(self) -> str:
        """What of a file's name tells its content from that of the model as trained."""
        parts = [f"{name}_{value}" for name, value in self.asked.items()]
        return "".join(f"-{part}" for part in [self.decision, *parts] if part)

    def problems(self, prefix: str = "inference") -> list[Problem]:
        """Everything wrong with the request, but for what only the model can tell."""
        remedy = "give a share above 0, up to 1"
        found = [
            Problem(key_of(prefix, name), value, "is not a share in (0, 1]", remedy)
            for name, value in (("capacity", self.capacity), ("layer_cap", self.layer_cap))
            if value is not None and not 0 < value <= 1
        ]
        found += at_least(self, prefix, 0, "step_cap")
        found += at_least(self, prefix, 1, "calibration_sequences")
        if not math.isfinite(self.shift):
            reason, remedy = "is not finite", "give a number; capacity=1 takes every token"
            found.append(Problem(key_of(prefix, "shift"), self.shift, reason, remedy))
        elif self.shift and self.capacity is not None:
            reason = f"moves the levels that {key_of(prefix, 'capacity')} calibrates"
            remedy = "leave one of the two out"
            found.append(Problem(key_of(prefix, "shift"), self.shift, reason, remedy))
        return found


@dataclass
class EvalRunConfig(TrainedRunConfig):
    """What a run is evaluated on, and at which setting of the dial.

    sequences: held-out sequences; null takes all.
    batch_size: sequences at a time.
    sweep: capacities; each router is moved to take
    each of them in turn, and the curve of loss over FLOPs replaces the evaluation.
    """

    sequences: int | None = None
    batch_size: int = 16
    inference: ComputeBudgetConfig = field(default_factory=ComputeBudgetConfig)
    sweep: list[float] | None = None

    def problems(self, prefix: str = "") -> list[Problem]:
        """Everything wrong with the request."""
        return [
            *super().problems(prefix),
            *at_least(self, prefix, 1, "sequences", "batch_size"),
            *self.inference.problems(key_of(prefix, "inference")),
            *self._sweep_problems(prefix),
        ]

    def _sweep_problems(self, prefix: str) -> list[Problem]:
        if self.sweep is None:
            return []
        key, remedy = key_of(prefix, "sweep"), "give capacities such as [0.0625, 0.125, 0.25, 1]"
        reasons = [f"holds {share}, not in (0, 1]" for share in self.sweep if not 0 < share <= 1]
        if not self.sweep:
            reasons.append("is empty")
        if len(set(self.sweep)) != len(self.sweep):
            reasons.append("names a capacity twice")
        found = [Problem(key, self.sweep, reason, remedy) for reason in reasons]
        for name in ("capacity", "shift"):
            if name in self.inference.asked:
                inner = key_of(key_of(prefix, "inference"), name)
                reason = f"stands beside {key}, which sets each point's own"
                value = self.inference.asked[name]
                found.append(Problem(inner, value, reason, "leave one of the two out"))
        return found
