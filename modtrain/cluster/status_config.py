"""Typed configuration of what is told of runs."""

from __future__ import annotations

from dataclasses import dataclass

from modtrain.common.errors import Problem


@dataclass
class StatusConfig:
    """Which runs to tell of.

    run: one of them, in detail, or a directory of runs; null: all below ``runs_dir``.
    sweep: the sweep whose table is shown.
    runs_dir: where runs live.
    """

    run: str | None = None
    sweep: str | None = None
    runs_dir: str = "runs"

    def problems(self, prefix: str = "") -> list[Problem]:
        """Everything wrong with the request."""
        del prefix
        if self.run is None or self.sweep is None:
            return []
        reason = "is given beside run: one of them is shown"
        return [Problem("sweep", self.sweep, reason, "leave one of them out")]
