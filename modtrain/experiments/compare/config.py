"""Typed configuration of a comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from modtrain.common.errors import Problem
from modtrain.common.validation import at_least
from modtrain.training.config import TrainConfig


@dataclass
class CompareConfig(TrainConfig):
    """Runs that share everything but their arm's overrides, the budget above all.

    arms: name of the arm → overrides of the training configuration, as on the command line. The
        first is what the others are compared with.
    seeds: each arm is trained with every one of these, for its weights and the order of its data;
        empty: once, as ``seed`` and ``data.seed`` say.
    only: arms to train and report; empty: all of them.
    train: false reports the complete runs and trains none.
    timed_rounds: training steps of each arm that are timed side by side at the end; 0: none.
    """

    arms: dict[str, list[str]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    only: list[str] = field(default_factory=list)
    train: bool = True
    timed_rounds: int = 8

    @property
    def chosen_arms(self) -> dict[str, list[str]]:
        """The arms selected by ``only``, in their order."""
        return {k: v for k, v in self.arms.items() if not self.only or k in self.only}

    def problems(self, needs_name: bool = True) -> list[Problem]:
        """Everything wrong with the comparison and with what its arms share."""
        problems = super().problems(needs_name)
        if len(self.arms) < 2:
            reason = "a comparison needs at least two arms"
            remedy = """add '+arms={a: ["model.capacity=0.5"], b: ["model.capacity=0.25"]}'"""
            problems.append(Problem("arms", dict(self.arms), reason, remedy))
        problems += [
            Problem("only", name, "is not an arm", f"there are: {', '.join(self.arms)}")
            for name in self.only
            if name not in self.arms
        ]
        if len(set(self.seeds)) != len(self.seeds):
            problems.append(Problem("seeds", self.seeds, "names a seed twice", "name each once"))
        problems += [
            Problem("seeds", seed, "is not in [0, 2^32)", "give one that is")
            for seed in self.seeds
            if not 0 <= seed < 2**32
        ]
        return problems + at_least(self, "", 0, "timed_rounds")


@dataclass(frozen=True)
class Comparison:
    """What is to be compared, composed and checked. arms: the runs of each arm, one a seed."""

    config: CompareConfig
    arms: dict[str, list[TrainConfig]]

    @property
    def directory(self) -> Path:
        """Where the report goes."""
        return Path(self.config.runs_dir) / str(self.config.name)
