"""Everything that a report shows: the runs, what they belong to, and what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modtrain.common.errors import DataError, Problem, raise_if_any
from modtrain.common.reading import UnreadableError
from modtrain.experiments.report.comparisons import ComparedArms, read_comparisons
from modtrain.experiments.report.config import ReportConfig
from modtrain.experiments.report.data_groups import DataGroup, group_by_data
from modtrain.experiments.report.files import printable
from modtrain.experiments.report.grids import Grid, GridFile, fit_grid, read_grids
from modtrain.experiments.report.runs import LeftOutError, Run, read_run
from modtrain.training.named_runs import name_of
from modtrain.training.run_listing import find_runs


@dataclass(frozen=True)
class LeftOut:
    """A run that is not reported. name: its path below the directory of runs."""

    name: str
    reason: str


@dataclass(frozen=True)
class Group:
    """Runs on the same data, and the comparisons and isoFLOP grids among them.

    comparisons: arms as `modtrain compare` reports them, by the comparison's name.
    """

    title: str
    runs: list[Run]
    comparisons: dict[str, dict[str, dict[str, Any]]]
    grids: list[Grid]


@dataclass(frozen=True)
class Collection:
    """All that a report is of. warnings: what a reader has to know first."""

    groups: list[Group]
    left_out: list[LeftOut] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """The runs of all groups."""
        return [run for group in self.groups for run in group.runs]


def collect(config: ReportConfig) -> Collection:
    """Read the runs that ``config`` names.

    Raises:
        ConfigError: a name or pattern has no run.
        DataError: no run can be reported.
    """
    root = Path(config.runs_dir)
    runs, left_out = [], []
    for path in _run_directories(root, config.runs):
        name = str(path.relative_to(root))
        try:
            runs.append(
                read_run(path, name, config.max_bytes, config.max_points, config.include_incomplete)
            )
        except (LeftOutError, UnreadableError) as error:
            left_out.append(LeftOut(printable(name), printable(str(error))))
    if not runs:
        lines = [f"  - {run.name}: {run.reason}" for run in left_out[:20]]
        remedy = "    remedy: name complete runs, or set include_incomplete=true"
        raise DataError("\n".join(["no run can be reported:", *lines, remedy]))
    return _grouped(root, runs, left_out, config)


def _grouped(
    root: Path, runs: list[Run], left_out: list[LeftOut], config: ReportConfig
) -> Collection:
    above = _directories_above(root, runs)
    comparisons, problems = read_comparisons(root, above, config.max_bytes)
    grids, of_grids = read_grids(root, above, config.max_bytes)
    series: dict[str, str] = {}
    for of_runs in [grid.series for grid in grids] + [pair.series for pair in comparisons]:
        series |= of_runs
    named = [
        replace(run, series=series.get(str(run.config.get("name")), run.series)) for run in runs
    ]
    groups = group_by_data(named)
    warnings = [*problems, *of_grids]
    if len(groups) > 1:
        warnings.append(
            f"The runs are on {len(groups)} data or held-out sets. Their losses cannot be compared:"
            " each set has figures of its own."
        )
    return Collection(
        [_group(data, comparisons, grids, config) for data in groups],
        left_out,
        warnings,
    )


def _group(
    data: DataGroup,
    comparisons: Sequence[ComparedArms],
    grids: Sequence[GridFile],
    config: ReportConfig,
) -> Group:
    fits = (fit_grid(grid, data.runs, config.bootstrap_samples) for grid in grids)
    reports = {c.name: c.report(data.runs) for c in comparisons}
    return Group(
        data.title,
        data.runs,
        {name: report for name, report in reports.items() if len(report) > 1},
        [grid for grid in fits if grid is not None],
    )


def _run_directories(root: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the directories of the runs at and below the named ones, each once.

    Raises:
        ConfigError: a name has none.
    """
    paths: dict[Path, None] = {}
    problems = []
    for given in patterns:
        pattern = name_of(str(root), given)
        tops = [root / pattern] if (root / pattern).is_dir() else sorted(root.glob(pattern))
        below = [
            path
            for top in tops
            if top.is_dir()
            for path in find_runs(top)
            # A group of jobs has no configuration of its own.
            if (path / "config.yaml").exists()
        ]
        paths |= dict.fromkeys(below)
        if not below:
            reason = f"has no run at or below it in {root}"
            problems.append(Problem("runs", pattern, reason, "modtrain status lists the runs"))
    raise_if_any(problems)
    return list(paths)


def _directories_above(root: Path, runs: Sequence[Run]) -> list[Path]:
    """Return the directories between ``root`` and the runs, the upper ones first."""
    above = {
        parent
        for run in runs
        for parent in run.path.parents
        if parent != root and parent.is_relative_to(root)
    }
    return sorted(above)
