"""The plan of a grid: every run in a table, the rules, what to beware of, and the sums."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from modtrain.common.errors import DataError
from modtrain.experiments.isoflop.config import IsoflopConfig
from modtrain.experiments.isoflop.grid import Grid, Point, Trunk
from modtrain.experiments.isoflop.speed import Hours, hours_of
from modtrain.models.flops import active_parameters, parameters
from modtrain.training.schedules import num_warmup_steps

# A parabola through fewer points says nothing of its own fit.
_FEWEST_SIZES = 5
_FAR_OFF = 0.25
_COLUMNS = (
    *("family", "budget", "size", "layers x width", "total", "active", "total, no embedding"),
    *("FLOPs a token", "over target", "steps", "tokens", "D/N", "epochs", "learning rate"),
    *("batch", "hours"),
)


def show_plan(grid: Grid, console: Console) -> None:
    """Print every run of the grid, the rules that made it, the warnings and the sums.

    Raises:
        ConfigError: ``gpu`` is not known.
    """
    config = grid.config
    hours, rate = hours_of(config, grid.points)
    seeds = f", each with {len(config.seeds)} seeds" if len(config.seeds) > 1 else ""
    columns = [*_COLUMNS, *(["trunk"] if grid.trunks else [])]
    table = Table(title=f"{config.name!s}: {len(grid.points)} runs{seeds}")
    for number, heading in enumerate(columns):
        table.add_column(heading, justify="right" if number else "left")
    last = None
    for point in one_seed(grid):
        if last not in (None, point.budget):
            table.add_section()
        last = point.budget
        trunk = [(point.trunk or "-").rpartition("trunk=")[2]] if grid.trunks else []
        table.add_row(*_row(point, hours), *trunk)
    console.print(table)
    for line in [*rules(config), *grid.notes]:
        console.print(f"- {line}", markup=False, soft_wrap=True)
    for line in warnings_of(grid):
        console.print(f"warning: {line}", markup=False, soft_wrap=True)
    runs: list[Trunk | Point] = [*grid.trunks, *grid.points]
    flops = sum(run.own_flops for run in runs)
    line = f"in all: {len(runs)} runs, {flops:.4g} training FLOPs"
    if grid.trunks:
        alone = sum(point.plan.flops for point in grid.points)
        line += f" in place of {alone:.4g} without the {len(grid.trunks)} shared trunks"
    if hours is not None:
        line += f", {sum(map(hours, runs)):.3g} hours one after the other, {rate}"
    console.print(line, markup=False, soft_wrap=True)


def one_seed(grid: Grid) -> list[Point]:
    """Return the points of the first seed, by budget and family, the smallest models first."""
    first = grid.points[0].seed
    order = list(dict.fromkeys(point.family for point in grid.points))
    points = [point for point in grid.points if point.seed == first]
    return sorted(points, key=lambda p: (p.budget, order.index(p.family), p.size))


def epochs_of(point: Point) -> float | None:
    """How often the point sees each token of its training data; None without prepared data."""
    try:
        summary = point.config.data.summary()
    except DataError:
        return None
    return point.plan.tokens / (summary.splits["train"].num_sequences * summary.seq_len)


def _row(point: Point, hours: Hours | None) -> list[str]:
    model, plan, epochs = point.resolved.model, point.plan, epochs_of(point)
    counts, active = parameters(model), active_parameters(model, plan.seq_len)
    return [
        point.family,
        f"{point.budget:g}",
        f"{point.size:g}",
        f"{model.num_layers} x {model.d_model}",
        f"{counts.total:,}",
        f"{active.total:,}",
        f"{counts.total - counts.embedding - counts.head:,}",
        f"{plan.flops_per_token:.3e}",
        "-" if point.target is None else f"{plan.flops_per_token / point.target:.3f}",
        f"{plan.steps:,}",
        f"{plan.tokens:,}",
        f"{6 * plan.tokens / plan.flops_per_token:.3g}",
        "-" if epochs is None else f"{epochs:.2f}",
        f"{point.config.optimizer.lr:g}",
        f"{point.config.batch.tokens:,}",
        "-" if hours is None else f"{hours(point):.3g}",
    ]


def rules(config: IsoflopConfig) -> list[str]:
    """Return the rules of the grid in sentences."""
    shape, lr, batch = config.shape, config.lr_rule, config.batch_rule
    ratios = "".join(f", {name} {r:g}" for name, r in config.tokens_per_parameter_of.items())
    factors = "".join(f", {name} {factor:g}" for name, factor in lr.factors.items())
    sizes = ", ".join(f"{size:g}" for size in sorted(config.sizes))
    return [
        f"size 1: D / N = {config.tokens_per_parameter:g}{ratios}, with N = F / 6, D = C / F, F"
        f" training FLOPs a token (executed, with the head), C the budget; sizes of F: {sizes}",
        f"shape: width / layers from {shape.aspect_min:g} to {shape.aspect_max:g}; within"
        f" {shape.tolerance:g} of F the one nearest to the middle, else the one nearest to F",
        f"learning rate: optimizer.lr x (width / {lr.width}) ^ -{lr.exponent:g}"
        + (f", times by family{factors}" if factors else ""),
        f"batch: batch.tokens x (C / {batch.budget:g}) ^ {batch.exponent:g}, rounded",
    ]


def warnings_of(grid: Grid) -> list[str]:
    """Return what makes the grid or a point of it doubtful."""
    warnings = [*_of_data(grid), *_of_steps(grid), *_of_warmup(grid), *_of_range(grid)]
    return [*warnings, *_of_shapes(grid.config, grid)]


def _of_data(grid: Grid) -> Iterator[str]:
    epochs = {point: epochs_of(point) or 0 for point in one_seed(grid)}
    repeated = [point for point in epochs if epochs[point] > 1]
    if repeated:
        most = max(repeated, key=lambda point: epochs[point])
        yield (
            f"data repeat in {len(repeated)} of {len(epochs)} points, up to {epochs[most]:.2f}"
            f" epochs ({_name(most)}): a repeated token is worth less, which favours larger"
            " models; prepare more text"
        )


def _of_steps(grid: Grid) -> Iterator[str]:
    least = grid.config.min_steps
    short = [point for point in one_seed(grid) if point.plan.steps < least]
    if short:
        fewest = min(short, key=lambda p: p.plan.steps)
        yield (
            f"{len(short)} of {len(one_seed(grid))} points have fewer than min_steps={least} steps,"
            f" down to {fewest.plan.steps} ({_name(fewest)}): lower batch.tokens"
        )


def _of_warmup(grid: Grid) -> Iterator[str]:
    for point in one_seed(grid):
        schedule, steps = point.config.schedule, point.plan.steps
        if schedule.name != "constant" and num_warmup_steps(schedule, steps) >= steps:
            yield f"{_name(point)} has {steps} steps, no more than its warm-up: it never decays"


def _of_range(grid: Grid) -> Iterator[str]:
    """Find budgets whose estimated optimum has no point on each side of it."""
    for family, optima in grid.optima.items():
        for budget, optimum in optima.items():
            points = [p for p in grid.points if (p.family, p.budget) == (family, budget)]
            sides = {
                "smaller": any(p.size < 1 and p.plan.flops_per_token < optimum for p in points),
                "larger": any(p.size > 1 and p.plan.flops_per_token > optimum for p in points),
            }
            for side in (side for side, has_points in sides.items() if points and not has_points):
                yield (
                    f"{family} at {budget:g} FLOPs has no {side} model than the estimated optimum,"
                    f" {optimum:.3g} FLOPs a token: its minimum will likely lie off the grid; add"
                    f" {side} sizes"
                )


def _of_shapes(config: IsoflopConfig, grid: Grid) -> Iterator[str]:
    if len(config.sizes) < _FEWEST_SIZES:
        yield f"{len(config.sizes)} sizes a budget are few for a fit: use {_FEWEST_SIZES} or more"
    for point in one_seed(grid):
        flops, target = point.plan.flops_per_token, point.target
        if target is not None and abs(flops / target - 1) > _FAR_OFF:
            yield (
                f"{_name(point)} has {flops / target:.2f} of the FLOPs a token it should have: no"
                " nearer shape is allowed; see shape.…"
            )


def _name(point: Point) -> str:
    return f"{point.family} at {point.budget:g} FLOPs, size {point.size:g}"
