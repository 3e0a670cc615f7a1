"""Train a grid of runs at equal training FLOPs, and write what a fit needs of them.

Imports no torch: the runs are forked from this process, which must not have started its threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console

from modtrain.cluster.status import wide_console
from modtrain.common.errors import ConfigError, DataError, Problem, raise_if_any
from modtrain.common.terminal import last_output
from modtrain.experiments.fit.config import FitConfig
from modtrain.experiments.fit.fit import fit
from modtrain.experiments.fit.fit_report import JSON as FIT_JSON
from modtrain.experiments.isoflop.config import IsoflopConfig
from modtrain.experiments.isoflop.grid import Grid, Point, Trunk, make_grid
from modtrain.experiments.isoflop.grid_report import show_plan, warnings_of
from modtrain.experiments.isoflop.points import (
    FIGURE,
    POINTS,
    UNFINISHED,
    collect,
    draw_points,
    show_lowest,
    write_points,
)
from modtrain.experiments.isoflop.trunks import share_trunks
from modtrain.experiments.sweep.launch_overrides import LaunchOverrides
from modtrain.experiments.sweep.runner import ComposeJob, Runner, refuse_several_processes
from modtrain.experiments.sweep.sweep import shared_problems
from modtrain.training.config import TrainConfig
from modtrain.training.run_directory import RunDirectory
from modtrain.training.stop_signal import STOP

FIT = "fit"


@dataclass(frozen=True)
class Isoflop:
    """A grid, composed and checked.

    families: what the points of each share. defaults: the training configuration without overrides.
    launch: how the runs are started. compose_job: builds the configuration of a Slurm job.
    user_dir: of the user's own YAML.
    """

    config: IsoflopConfig
    families: Mapping[str, TrainConfig]
    defaults: TrainConfig
    launch: LaunchOverrides
    compose_job: ComposeJob
    user_dir: str | None = None


def isoflop(request: Isoflop) -> int:
    """Print the plan of the grid, or train its points and write ``points.csv`` and a figure.

    Returns:
        The exit code: 0 where every point is complete; 130 or 75 where a signal stopped the grid;
        else 1.

    Raises:
        ConfigError: everything wrong with any point, before one starts.
        CheckpointError: another process trains the grid, or the file system has no locks.
    """
    config, console = request.config, wide_console()
    refuse_several_processes("isoflop")
    runner = Runner(request.launch, request.compose_job, request.user_dir)
    grid = make_grid(config, request.families, request.defaults)
    if config.share_trunk:
        grid = share_trunks(grid, request.defaults)
    if config.plan_only:
        show_plan(grid, console)
        return 0
    _check(grid, runner)
    for line in warnings_of(grid):
        console.print(f"warning: {line}", markup=False, soft_wrap=True)
    code = _train(grid, runner)
    if not runner.is_dry_run and _report(grid, console) and not STOP.requested:
        _fit(config, console)
    return code


def _train(grid: Grid, runner: Runner) -> int:
    """Train the trunks, then the points whose trunk is complete; return the exit code."""
    directory, code = grid.config.directory, 0
    if grid.trunks:
        code = runner.train(directory, [(trunk.job, trunk.config) for trunk in grid.trunks])
        if STOP.requested:
            return code
    trunks = {str(trunk.config.name): RunDirectory.of(trunk.config) for trunk in grid.trunks}
    ready = [
        (point.job, point.config)
        for point in grid.points
        if runner.is_dry_run or point.trunk is None or trunks[point.trunk].is_complete
    ]
    return runner.train(directory, ready) or code


def _check(grid: Grid, runner: Runner) -> None:
    """Raise ConfigError with everything that keeps a point from being trained."""
    wrong: dict[Problem, list[str]] = {}
    runs: list[Trunk | Point] = [*grid.trunks, *grid.points]
    for run in runs:
        try:
            runner.check(run.config)
        except ConfigError as error:
            for problem in error.problems:
                wrong.setdefault(problem, []).append(run.job.name)
    raise_if_any(shared_problems(wrong, len(runs)) + runner.multirun.problems())


def _report(grid: Grid, console: Console) -> bool:
    """Write and print the results of the complete points, and name the others.

    Returns whether there are any.
    """
    results, missing = collect(grid.points)
    unfinished = [name for name, reason in missing.items() if reason in UNFINISHED]
    with last_output():
        for name in (name for name in missing if name not in unfinished):
            first = missing[name].partition("\n")[0]
            console.print(f"left out of {POINTS}: {name}: {first}", markup=False, soft_wrap=True)
        if unfinished:
            count = f"{len(unfinished)} of {len(grid.points)}"
            console.print(f"not trained to their end yet: {count} points")
    directory = grid.config.directory
    if not results:
        # What is there may be of an earlier start with other points.
        for name in (POINTS, FIGURE):
            (directory / name).unlink(missing_ok=True)
        return False
    write_points(results, grid.config.parameters, directory / POINTS)
    draw_points(grid, results, directory / FIGURE)
    with last_output():
        show_lowest(results, console)
        console.print(
            f"{len(results)} of {len(grid.points)} points: {directory / POINTS}\n"
            f"figure: {(directory / FIGURE).resolve()}",
            markup=False,
            soft_wrap=True,
        )
    return True


def _fit(config: IsoflopConfig, console: Console) -> None:
    """Fit the points as `modtrain fit` does, where they are enough."""
    # The first family is the one to compare with; a fit itself says what it counts.
    settings = FitConfig(
        points=str(config.directory / POINTS),
        output=str(config.directory / FIT),
        baseline=next(iter(config.families)),
        parameters=config.parameters,
    )
    try:
        fit(settings, console)
    except DataError as error:
        # It would be of an earlier start with other points.
        (config.directory / FIT / FIT_JSON).unlink(missing_ok=True)
        with last_output():
            console.print(f"no fit yet: {error}", markup=False, soft_wrap=True)
