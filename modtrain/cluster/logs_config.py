"""Typed configuration of what is shown of a run's output."""

from __future__ import annotations

import re
from dataclasses import dataclass

from modtrain.common.errors import Problem
from modtrain.common.validation import at_least, not_empty


@dataclass
class LogsConfig:
    """Whose output to show.

    run: the run's name below ``runs_dir``.
    runs_dir: where runs live.
    follow: continue until the run's jobs are over, over requeues and a chain.
    lines: how many of the last lines come first.
    job: one of the run's jobs, a task of an array as ``job='"123_4"'``; null takes the newest that
        has begun.
    """

    run: str | None = None
    runs_dir: str = "runs"
    follow: bool = False
    lines: int = 50
    job: str | None = None

    def problems(self, prefix: str = "") -> list[Problem]:
        """Everything wrong with the request."""
        found = [
            *not_empty(self, prefix, "run", "add run=my_run"),
            *at_least(self, prefix, 0, "lines"),
        ]
        if self.job is not None and not re.fullmatch(r"\d+(_\d+)?", self.job):
            remedy = "give one that `modtrain status` shows"
            found.append(Problem("job", self.job, "is no job's number", remedy))
        return found
