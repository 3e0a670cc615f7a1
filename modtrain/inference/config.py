"""Typed configuration of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from modtrain.checks import at_least, not_empty, one_of
from modtrain.errors import Problem
from modtrain.training.config import ACCELERATORS, PRECISIONS


@dataclass
class EvalRunConfig:
    """Which run is evaluated, and on what.

    run: the run's name below ``runs_dir``. step: which checkpoint; null takes the newest.
    data_path: another prepared directory than the run's own, made with the same tokenizer.
    sequences: held-out sequences; null takes all.
    """

    run: str | None = None
    runs_dir: str = "runs"
    step: int | None = None
    data_path: str | None = None
    sequences: int | None = None
    batch_size: int = 16
    accelerator: str = "auto"
    precision: str = "auto"

    def problems(self, prefix: str = "") -> list[Problem]:
        """Everything wrong with the request."""
        return [
            *not_empty(self, prefix, "run", "add run=my_run"),
            *at_least(self, prefix, 1, "sequences", "batch_size"),
            *one_of(self, prefix, "accelerator", ACCELERATORS),
            *one_of(self, prefix, "precision", PRECISIONS),
        ]
