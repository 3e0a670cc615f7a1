"""Typed configuration of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

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
        found = []
        if not self.run:
            found.append(Problem(f"{prefix}run", "null", "names no run", "add run=my_run"))
        for name in ("sequences", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(Problem(prefix + name, value, "is below 1", "give 1 or more"))
        for name, choices in (("accelerator", ACCELERATORS), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                remedy = f"use one of: {', '.join(choices)}"
                found.append(Problem(prefix + name, getattr(self, name), "is not known", remedy))
        return found
