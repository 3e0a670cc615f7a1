"""Configuration of what changes over a run: the learning rate and the capacities."""

from __future__ import annotations

from dataclasses import dataclass

from modtrain.common.errors import Problem
from modtrain.common.validation import at_least, one_of, shares

SCHEDULES = ("cosine", "linear", "wsd", "constant")
CAPACITY_SCHEDULES = ("constant", "linear", "cosine", "step")


@dataclass
class ScheduleConfig:
    """The learning rate over exactly the run's steps.

    name: ``cosine``, ``linear``, ``wsd`` (warm-up, stable, linear decay) or ``constant``.
    warmup: share of the steps in which the rate rises from 0.
    decay: share of the steps at the end in which wsd decays.
    final: the last rate divided by the highest.
    warmup_steps: the warm-up as a number of steps, whatever the run's length; null: by ``warmup``.
    """

    name: str = "cosine"
    warmup: float = 0.02
    decay: float = 0.2
    final: float = 0.1
    warmup_steps: int | None = None

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the schedule."""
        problems = one_of(self, prefix, "name", SCHEDULES)
        problems += shares(self, prefix, "warmup", "decay", "final")
        problems += at_least(self, prefix, 1, "warmup_steps")
        is_of_run = self.name == "wsd" and self.warmup_steps is None
        if not problems and is_of_run and self.warmup + self.decay > 1:
            reason = f"and {prefix}.warmup={self.warmup} are more than the run"
            remedy = "let their sum be 1 at most"
            problems.append(Problem(f"{prefix}.decay", self.decay, reason, remedy))
        return problems


@dataclass
class CapacityScheduleConfig:
    """The capacity of each routed layer over the run: from ``start`` to the model's own.

    name: ``constant``: the model's own throughout. ``linear``, ``cosine`` (half a cosine): from
        ``start`` at ``begin`` to the model's own at ``end``. ``step``: changes at ``end``.
    start: the first capacity of every routed layer, in (0, 1].
    begin, end: shares of the run's tokens.
    levels: for linear and cosine, how many values a capacity takes, including first and last; a
        compiled model is recompiled ``levels - 1`` times at most.
    """

    name: str = "constant"
    start: float = 1.0
    begin: float = 0.0
    end: float = 0.5
    levels: int = 8

    @property
    def num_levels(self) -> int:
        """The number of values that a capacity takes over the run."""
        return {"constant": 1, "step": 2}.get(self.name, self.levels)

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the capacity schedule."""
        problems = [
            *one_of(self, prefix, "name", CAPACITY_SCHEDULES),
            *shares(self, prefix, "begin", "end"),
            *at_least(self, prefix, 2, "levels"),
        ]
        if not 0 < self.start <= 1:
            reason = "is not a share of the tokens in (0, 1]"
            remedy = "1 takes all the tokens"
            problems.append(Problem(f"{prefix}.start", self.start, reason, remedy))
        if self.begin > self.end:
            reason = f"is after {prefix}.end={self.end}"
            problems.append(Problem(f"{prefix}.begin", self.begin, reason, "begin before the end"))
        is_never_reached = self.end == 1 if self.name == "step" else self.begin == 1
        if not problems and is_never_reached and self.name != "constant":
            key = "end" if self.name == "step" else "begin"
            reason = "leaves no step with the model's own capacities"
            problems.append(Problem(f"{prefix}.{key}", 1, reason, "let it change earlier"))
        return problems
