"""All figures of a group of runs."""

from __future__ import annotations

from modtrain.experiments.report.collect import Group
from modtrain.experiments.report.interactive.curves import final_losses, loss_curves
from modtrain.experiments.report.interactive.grids import isoflop_curves
from modtrain.experiments.report.interactive.routers import (
    capacity_map,
    router_health,
    swap_changes,
    worth_map,
)
from modtrain.experiments.report.interactive.specs import Interactive


def interactive_figures(group: Group, prefix: str) -> list[Interactive]:
    """Return the figures of a group that have something to show. prefix: of their keys."""
    runs = group.runs
    figures = [
        loss_curves(group, f"{prefix}loss"),
        final_losses(group, f"{prefix}cost"),
        *(isoflop_curves(grid, f"{prefix}isoflop-{i}") for i, grid in enumerate(group.grids)),
        capacity_map(runs, f"{prefix}capacity"),
        router_health(runs, f"{prefix}health"),
        worth_map(runs, f"{prefix}worth"),
        swap_changes(runs, f"{prefix}swaps"),
    ]
    return [figure for figure in figures if figure is not None]
