"""The figures of a fit, in the colours of matplotlib's settings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib import colormaps, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modtrain.experiments.fit.frontier import Frontier
from modtrain.experiments.fit.points import Array
from modtrain.experiments.fit.results import FamilyFit, Fit

_NUM_ON_CURVE = 80
# More budgets than this share a panel's legend badly, and more panels a page.
_MOST_LABELS = 8
_MOST_PANELS = 24
_PANEL = 6.0, 4.3
# The middle of the colour map: its ends are hard to see on white or on black.
_COLOURS = 0.3, 0.85


def plain(text: str) -> str:
    """Return text as matplotlib shows it letter by letter: a dollar sign begins no formula."""
    return text.replace("$", r"\$")


def loss_figure(fit: Fit) -> Figure:
    """Draw loss over N, a panel for each family and a colour for each budget.

    Lines are the law at the budget, bands its interval; dotted the parabolas.
    """
    families = list(fit.families.values())[:_MOST_PANELS]
    num_columns = min(len(families), 2)
    num_rows = math.ceil(len(families) / num_columns)
    figure = Figure(figsize=(_PANEL[0] * num_columns, _PANEL[1] * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes, family in zip(panels.flat, families, strict=False):
        _draw_loss(axes, family, fit)
    for axes in panels.flat[len(families) :]:
        axes.set_axis_off()
    return figure


def _draw_loss(axes: Axes, family: FamilyFit, fit: Fit) -> None:
    points = family.points
    alone = np.setdiff1d(np.arange(len(points)), np.concatenate([*family.groups.values(), [-1]]))
    if len(alone):
        style: dict[str, Any] = {"ms": 4, "color": rcParams["axes.edgecolor"]}
        axes.plot(points.N_P[alone], points.loss_P[alone], "o", label="other FLOPs", **style)
    for (C, group), colour in zip(family.groups.items(), _spread(len(family.groups)), strict=True):
        N, loss = points.N_P[group], points.loss_P[group]
        label = f"{C:.2g} FLOPs" if len(family.groups) <= _MOST_LABELS else None
        axes.plot(N, loss, "o", ms=5, color=colour, label=label)
        _draw_law(axes, family, C, N, colour, fit.config.level)
        for parabola in family.parabolas:
            if parabola.C == C:
                grid = np.geomspace(N.min(), N.max(), _NUM_ON_CURVE)
                axes.plot(grid, parabola.loss_at(grid), ":", color=rcParams["text.color"], lw=1)
    if family.parabolas:
        axes.plot([], [], ":", color=rcParams["text.color"], lw=1, label="parabola (biased)")
    if best := [(o.N.value, o.loss.value) for o in family.optima if o.num_points]:
        style = {"ls": "", "marker": "*", "ms": 10, "color": rcParams["text.color"]}
        axes.plot(*zip(*best, strict=True), label="optimum by the law", **style)
    axes.set_xscale("log")
    axes.set_xlabel(_parameters_label(fit))
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(plain(f"{family.name}: {len(points)} points"), fontsize="medium")
    axes.grid(alpha=0.25)
    axes.legend(fontsize="x-small", loc="upper right")


def _draw_law(axes: Axes, family: FamilyFit, C: float, N: Array, colour: Any, level: float) -> None:
    grid = np.geomspace(N.min() / 1.3, N.max() * 1.3, _NUM_ON_CURVE)
    rule = family.frontier.rule
    axes.plot(grid, family.fit.law.loss(grid, rule.tokens(grid, C)), color=colour, lw=1.5)
    laws = family.frontiers.law
    if np.size(laws.E):
        losses = np.stack([laws.loss(size, rule.tokens(size, C)) for size in grid])
        _draw_band(axes, grid, losses, colour, level)


def _draw_band(axes: Axes, grid: Array, values_GS: Array, colour: Any, level: float) -> None:
    low, high = np.quantile(values_GS, [(1 - level) / 2, (1 + level) / 2], axis=1)
    axes.fill_between(grid, low, high, color=colour, alpha=0.2, lw=0)


def frontier_figure(fit: Fit) -> Figure | None:
    """Draw N* and D* over C, a colour for each family; None where no family has an optimum."""
    families = [family for family in fit.families.values() if family.optima]
    if not families:
        return None
    figure = Figure(figsize=(2 * _PANEL[0], _PANEL[1]), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("N", "D"), strict=True):
        for number, family in enumerate(families):
            _draw_frontier(axes, family, name, f"C{number % 10}", fit.config.level)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("training FLOPs")
        axes.grid(alpha=0.25)
        axes.legend(fontsize="x-small", loc="upper left")
    figure.axes[0].set_ylabel(f"N*: {_parameters_label(fit)}")
    figure.axes[1].set_ylabel("D*: training tokens")
    return figure


def _draw_frontier(axes: Axes, family: FamilyFit, name: str, colour: str, level: float) -> None:
    budgets = [optimum.C for optimum in family.optima]
    grid = np.geomspace(min(budgets) / 1.2, max(budgets) * 1.2, _NUM_ON_CURVE)
    label = plain(f"{family.name}: {name}* ~ C^{family.exponents[name].value:.3f}")
    axes.plot(grid, _optimal(family.frontier, name, grid), color=colour, label=label)
    if np.size(family.frontiers.law.E):
        values = np.stack([_optimal(family.frontiers, name, C) for C in grid])
        _draw_band(axes, grid, values, colour, level)
    if name == "N" and family.parabolas:
        minima = [(parabola.C, parabola.N.value) for parabola in family.parabolas]
        style: dict[str, Any] = {"marker": "x", "ls": "", "color": colour}
        axes.plot(*zip(*minima, strict=True), label="parabolas (biased)", **style)


def _optimal(frontier: Frontier, name: str, C: Any) -> Any:
    return frontier.parameters(C) if name == "N" else frontier.tokens(C)


def residual_figure(fit: Fit) -> Figure:
    """Draw the residuals of log L over N, D and the loss, a colour for each family."""
    figure = Figure(figsize=(2 * _PANEL[0], 0.8 * _PANEL[1]), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for number, family in enumerate(fit.families.values()):
        points = family.points
        residual = 100 * np.log(points.loss_P / family.fit.law.loss(points.N_P, points.D_P))
        style: dict[str, Any] = {"ls": "", "marker": "o", "ms": 4, "color": f"C{number % 10}"}
        for axes, x in zip(panels, (points.N_P, points.D_P, points.loss_P), strict=True):
            axes.plot(x, residual, label=plain(family.name), **style)
    labels = _parameters_label(fit), "training tokens D", "loss (nats a token)"
    for axes, label in zip(panels, labels, strict=True):
        axes.axhline(0, color=rcParams["axes.edgecolor"], lw=1)
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
    panels[0].set_xscale("log")
    panels[1].set_xscale("log")
    panels[0].set_ylabel("measured over the law (%)")
    panels[0].legend(fontsize="x-small", loc="upper right")
    return figure


def _spread(count: int) -> Any:
    return colormaps["plasma"](np.linspace(*_COLOURS, max(count, 1))[:count])


def _parameters_label(fit: Fit) -> str:
    counted = fit.config.parameters
    return plain(f"parameters N ({counted})" if counted else "parameters N")
