"""Budgets of one shape from one run: each budget's decay branches off a shared trunk.

Under ``schedule=wsd`` the learning rate is constant between warm-up and decay. So the runs of one
shape at several budgets have their first steps in common, and these are trained once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace

from modtrain.experiments.isoflop.grid import Grid, Point, Trunk
from modtrain.experiments.sweep.jobs import SweepJob, job_name, overrides_between
from modtrain.training.config import BranchConfig, BudgetConfig, TrainConfig
from modtrain.training.plan import derive
from modtrain.training.schedules import decay_start


def share_trunks(grid: Grid, defaults: TrainConfig) -> Grid:
    """Return the grid with a trunk for each model that is trained at several budgets.

    The trunk has the constant rate up to the longest budget's start of decay, and keeps a
    checkpoint where each budget's begins. defaults: as in `make_grid`.
    """
    groups: dict[str, list[Point]] = {}
    for point in grid.points:
        groups.setdefault(_shared_part(point), []).append(point)
    shared = [group for group in groups.values() if len(group) > 1]
    trunks = [_trunk(grid, group, defaults) for group in shared]
    branches: dict[Point, Point] = {}
    for trunk, group in zip(trunks, shared, strict=True):
        branches |= {point: _branch(point, trunk, defaults) for point in group}
    notes = list(grid.notes)
    if not trunks:
        notes.append(
            "no model is trained at two budgets, so none shares a trunk: with"
            " sizes=[0.25,0.5,1,2,4] budgets of ratio 4 have shapes in common"
        )
    points = [branches.get(point, point) for point in grid.points]
    return replace(grid, points=points, trunks=trunks, notes=notes)


def _shared_part(point: Point) -> str:
    """Return what points of one trunk have in common; a key of its own for one that has no decay.

    Sizes of the grid differ, for they are relative to each budget's optimum.
    """
    config, steps = point.config, point.plan.steps
    if config.schedule.name != "wsd" or decay_start(config.schedule, steps) >= steps:
        return str(config.name)
    return f"{point.family} {astuple(replace(config, name=None, budget=BudgetConfig()))}"


def _trunk(grid: Grid, points: Sequence[Point], defaults: TrainConfig) -> Trunk:
    longest = max(points, key=lambda point: point.plan.steps)
    config, model = longest.config, longest.resolved.model
    starts = sorted({_start(point) for point in points})
    labels = {"family": longest.family, "trunk": f"{model.num_layers}x{model.d_model}"}
    labels |= {"seed": str(longest.seed)} if grid.config.seeds else {}
    config = replace(
        config,
        name=f"{grid.config.name}/{job_name(labels)}",
        budget=BudgetConfig(steps=starts[-1]),
        schedule=replace(config.schedule, name="constant"),
        checkpoint=replace(config.checkpoint, keep_steps=starts),
    )
    resolved = replace(config, model=model, data=longest.resolved.data)
    job = SweepJob(job_name(labels), labels, overrides_between(defaults, config))
    return Trunk(longest.family, config, resolved, derive(resolved, longest.plan.dims), job)


def _branch(point: Point, trunk: Trunk, defaults: TrainConfig) -> Point:
    branch = BranchConfig(str(trunk.config.name), _start(point))
    config = replace(point.config, branch=branch)
    job = replace(point.job, overrides=overrides_between(defaults, config))
    return replace(point, config=config, resolved=replace(point.resolved, branch=branch), job=job)


def _start(point: Point) -> int:
    return decay_start(point.config.schedule, point.plan.steps)
