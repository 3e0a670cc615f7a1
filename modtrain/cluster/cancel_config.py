"""Typed configuration of how a run's jobs are ended."""

from __future__ import annotations

from dataclasses import dataclass

from modtrain.common.errors import Problem
from modtrain.common.validation import at_least, not_empty


@dataclass
class CancelConfig:
    """Whose jobs to end.

    run: the run's name below ``runs_dir``.
    runs_dir: where runs live.
    save: let a running job save a checkpoint first.
    wait: seconds that it has for that; then it is ended.
    """

    run: str | None = None
    runs_dir: str = "runs"
    save: bool = True
    wait: float = 300

    def problems(self, prefix: str = "") -> list[Problem]:
        """Everything wrong with the request."""
        return [
            *not_empty(self, prefix, "run", "add run=my_run"),
            *at_least(self, prefix, 0, "wait"),
        ]
