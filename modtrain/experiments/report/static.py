"""The figures of a report as SVG and PNG, for papers and slides."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from modtrain.common.atomic_io import write_bytes
from modtrain.experiments.fit.figures import loss_figure, plain
from modtrain.experiments.report.collect import Group
from modtrain.experiments.report.runs import Run
from modtrain.experiments.report.series import (
    COLOURS,
    LEAST_CAPACITY,
    LOSS_LABEL,
    MOST_LABELS,
    PROGRESS,
    Cost,
    Progress,
    costs,
    is_wide,
    loss_range,
    pareto_front,
    short_names,
    styles,
)

_DASHES = {"solid": "-", "dot": ":", "dashdot": "-.", "longdash": (0, (8, 3))}
_SIZE = 7.0, 4.5
_MOST_PANELS = 6
_MOST_TICKS = 40
_LONGEST_TITLE = 60


def write_figures(group: Group, prefix: str, directory: Path) -> list[Path]:
    """Write each figure of a group as SVG and PNG; return the paths. prefix: of their names."""
    paths = []
    for name, figure in _figures(group):
        # The layout takes longest, and is that of both files.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        paths += [_save(figure, directory / f"{prefix}{name}.{e}") for e in ("svg", "png")]
    return paths


def _save(figure: Figure, path: Path) -> Path:
    content = io.BytesIO()
    metadata = {"Date": None} if path.suffix == ".svg" else None
    # Names as text, not as shapes: an SVG of 200 runs would be many times larger.
    with rc_context({"svg.hashsalt": "modtrain", "svg.fonttype": "none"}):
        figure.savefig(content, format=path.suffix[1:], dpi=130, metadata=metadata)
    write_bytes(path, content.getvalue(), path.parent)
    return path


def _figures(group: Group) -> Iterator[tuple[str, Figure]]:
    runs = group.runs
    if curves := [run for run in runs if len(run.metrics.curve)]:
        for axis in PROGRESS:
            if any(axis.values(run) for run in curves):
                yield f"loss_over_{axis.key}", _draw(partial(_curves, curves, axis))
    for cost in costs(runs):
        yield f"loss_over_{cost.key}", _draw(partial(_final_losses, runs, cost))
    for place, grid in enumerate(group.grids):
        if grid.fit is not None:
            yield f"isoflop_{place}", loss_figure(grid.fit)
    known = [run for run in runs if run.capacities]
    if any(run.is_routed for run in known):
        yield "capacity", _draw(partial(_capacities, known))
    if healthy := [run for run in runs if run.metrics.routers]:
        yield "router_health", _router_health(healthy)
    if judged := [run for run in runs if run.worth]:
        yield "router_worth", _draw(partial(_worth, judged))


def _draw(draw: Callable[[Axes], None], size: tuple[float, float] = _SIZE) -> Figure:
    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots())
    return figure


def _curves(runs: Sequence[Run], axis: Progress, axes: Axes) -> None:
    style = styles(runs)
    labelled: set[str] = set()
    for run in runs:
        if values := axis.values(run):
            dash = _DASHES[style[run.series].dash] if run.is_complete else "--"
            label = None if run.series in labelled else plain(run.series)
            labelled.add(run.series)
            line: dict[str, Any] = {"color": style[run.series].colour, "ls": dash, "lw": 1.3}
            axes.plot(values, run.metrics.curve.loss, label=label, **line)
    ends = [axis.values(run)[-1] for run in runs if axis.values(run)]
    axes.set_ylim(loss_range(runs))
    _finish(axes, axis.title, ends, len(style))


def _final_losses(runs: Sequence[Run], cost: Cost, axes: Axes) -> None:
    style = styles(runs)
    known = [run for run in runs if run.name in cost.values]
    points = {run.name: (cost.values[run.name], run.loss) for run in known}
    labelled: set[str] = set()
    for run in known:
        label = None if run.series in labelled else plain(run.series)
        labelled.add(run.series)
        colour = style[run.series].colour
        face = colour if run.is_complete else "none"
        axes.plot(*points[run.name], "o", color=colour, markerfacecolor=face, label=label)
    front = [points[name] for name in pareto_front(points)]
    line: dict[str, Any] = {"color": "grey", "lw": 1, "marker": "o", "ms": 11, "mfc": "none"}
    axes.step(*zip(*front, strict=True), where="post", label="Pareto front", **line)
    _finish(axes, cost.title, list(cost.values.values()), len(style))


def _finish(axes: Axes, title: str, values: Sequence[float], num_series: int) -> None:
    if is_wide(values):
        axes.set_xscale("log")
    elif max(values) >= 1000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(title)
    axes.set_ylabel(LOSS_LABEL)
    axes.grid(alpha=0.3)
    if num_series <= MOST_LABELS:
        axes.legend(fontsize="small")


def _capacities(runs: Sequence[Run], axes: Axes) -> None:
    most = max(len(run.capacities) for run in runs)
    map_LR = np.full((most, len(runs)), np.nan)
    for column, run in enumerate(runs):
        shares = [1.0 if c is None else max(c, LEAST_CAPACITY) for c in run.capacities]
        map_LR[: len(shares), column] = np.log2(shares)
    image = axes.imshow(map_LR, aspect="auto", vmin=math.log2(LEAST_CAPACITY), vmax=0)
    bar = axes.figure.colorbar(image, ax=axes, label="share of the tokens")
    ticks = range(round(math.log2(LEAST_CAPACITY)), 1)
    bar.set_ticks(list(ticks), labels=["1" if t == 0 else f"1/{2**-t}" for t in ticks])
    axes.set_ylabel("layer")
    _name_runs(axes, runs)


def _worth(runs: Sequence[Run], axes: Axes) -> None:
    labels = sorted({label for run in runs for label in run.worth})
    map_LR = np.array([[100 * run.worth.get(x, math.nan) for run in runs] for x in labels])
    most = float(np.nanmax(np.abs(map_LR))) or 1.0
    image = axes.imshow(map_LR, aspect="auto", cmap="RdBu", vmin=-most, vmax=most)
    axes.figure.colorbar(image, ax=axes, label="loss without it (%)")
    shown = range(0, len(labels), -(-len(labels) // 24))
    axes.set_yticks(list(shown), [labels[i] for i in shown])
    _name_runs(axes, runs)


def _name_runs(axes: Axes, runs: Sequence[Run]) -> None:
    if len(runs) > _MOST_TICKS:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(runs)} runs")
        return
    names = [plain(name) for name in short_names([run.name for run in runs])]
    axes.set_xticks(range(len(runs)), names, rotation=60, ha="right", fontsize="x-small")


def _router_health(runs: Sequence[Run]) -> Figure:
    """Draw the run with the lowest loss of each series, at most six."""
    best: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: run.loss):
        best.setdefault(run.series, run)
    shown = list(best.values())[:_MOST_PANELS]
    figure = Figure(figsize=(7, 2.6 * len(shown)), layout="constrained")
    rows = figure.subplots(len(shown), 2, squeeze=False)
    for (gate_axes, update_axes), run in zip(rows, shown, strict=True):
        for place, (label, history) in enumerate(sorted(run.metrics.routers.items())):
            style: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "label": label}
            gate_axes.plot(history.tokens, history.gate, **style)
            update_axes.plot(history.tokens, history.update, **style)
        gate_axes.set_title(plain(run.name[-_LONGEST_TITLE:]), fontsize="small", loc="left")
        gate_axes.set_ylabel("mean gate")
        update_axes.set_ylabel("update over stream")
        for axes in (gate_axes, update_axes):
            axes.set_xlabel("training tokens")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.grid(alpha=0.3)
        if len(run.metrics.routers) <= MOST_LABELS:
            update_axes.legend(fontsize="x-small")
    return figure
