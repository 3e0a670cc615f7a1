"""Typed configuration of how a run's jobs are ended."""

from __future__ import annotations

from dataclasses import dataclass

from modtrain.common.errors import Problem
from modtrain.common.validation import at_least, not_empty


@dataclass
class CancelConfig:
    """Whose jobs to end.

    save: let a running job save a checkpoint first. wait: seconds that it has for that.
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
