"""Typed configuration of a report. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, broken_rules

_LEAST_SAMPLES = 20


@dataclass
class ReportConfig:
    """Which runs are reported, and where the page goes.

    runs: names below ``runs_dir`` of runs, sweeps, searches, comparisons or isoFLOP grids: every
        run at or below each is reported. ``*`` and ``**`` stand for any names: ``study/*``.
    runs_dir: directory of the runs.
    output: directory for ``index.html``, the figures and the tables.
    include_incomplete: report runs that are not complete as well; their curves are dashed.
    equivalence_margin: over several seeds two arms of a comparison are tested for a change of the
        loss of less than this share.
    max_points: points of a run's curve that are drawn.
    bootstrap_samples: resamples for the bands of isoFLOP fits; 0: no bands.
    max_bytes: size from which on a file of a run is not read.
    """

    runs: list[str] = field(default_factory=list)
    runs_dir: str = "runs"
    output: str = "report"
    include_incomplete: bool = False
    equivalence_margin: float = 0.005
    max_points: int = 200
    bootstrap_samples: int = 100
    max_bytes: int = 2**28

    def problems(self) -> list[Problem]:
        """Everything wrong with the report."""
        samples = self.bootstrap_samples
        few = f"is neither 0 nor {_LEAST_SAMPLES} or more"
        output = Path(self.output)
        in_the_way = output.exists() and not output.is_dir()
        no_runs, all_runs = "a report needs runs", "write runs=[NAME, ...]; runs=['*'] takes all"
        return [
            *broken_rules(
                self,
                "",
                (not self.runs, "runs", no_runs, all_runs),
                (not Path(self.runs_dir).is_dir(), "runs_dir", "is not a directory", "name one"),
                (not self.output, "output", "is empty", "name a directory"),
                (in_the_way, "output", "is a file", "name a directory"),
                (samples < _LEAST_SAMPLES and samples != 0, "bootstrap_samples", few, "use 100"),
            ),
            *self._pattern_problems(),
            *above_zero(self, "", "equivalence_margin"),
            *at_least(self, "", 2, "max_points"),
            *at_least(self, "", 1, "max_bytes"),
        ]

    def _pattern_problems(self) -> Iterator[Problem]:
        for pattern in self.runs:
            path = PurePath(pattern)
            if path.is_absolute() or ".." in path.parts:
                remedy = "name runs by their path below runs_dir, and set runs_dir"
                yield Problem("runs", pattern, "does not lie below runs_dir", remedy)
            elif not path.parts:
                yield Problem("runs", pattern, "names no run", "write '*' for all of runs_dir")
            elif any("**" in part and part != "**" for part in path.parts):
                remedy = "write ** between slashes: study/**/dense"
                yield Problem("runs", pattern, "has ** within a name", remedy)
