"""Typed configuration of a comparison."""

from __future__ import annotations

from dataclasses import dataclass, field

from modtrain.checks import at_least
from modtrain.errors import Problem
from modtrain.training.config import TrainConfig


@dataclass
class CompareConfig(TrainConfig):
    """Runs that share everything but their arm's overrides, the budget above all.

    arms: name of the arm → overrides of the training configuration, as on the command line. The
        first is what the others are compared with.
    timed_rounds: training steps of each arm that are timed side by side at the end.
    """

    arms: dict[str, list[str]] = field(default_factory=dict)
    timed_rounds: int = 8

    def problems(self, needs_name: bool = True) -> list[Problem]:
        """Everything wrong with the comparison and what its arms share."""
        found = super().problems(needs_name)
        if len(self.arms) < 2:
            found.append(
                Problem(
                    "arms",
                    dict(self.arms),
                    "a comparison has at least two arms",
                    """add '+arms={a: ["model.capacity=0.5"], b: ["model.capacity=0.25"]}'""",
                )
            )
        return found + at_least(self, "", 1, "timed_rounds")
