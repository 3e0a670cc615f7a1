"""The figures of the page, as what plotly.js draws: plain values, without colours of the page.

A figure has ``data`` and ``layout`` as Plotly has them. ``views`` are axes to choose from: each has
a ``label``, and the ``x``, maybe the ``y``, of every trace. ``choices`` replace all data instead.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modtrain.experiments.fit.results import FamilyFit
from modtrain.experiments.report.collect import Group
from modtrain.experiments.report.grids import Grid
from modtrain.experiments.report.runs import Run
from modtrain.experiments.report.series import (
    COLOURS,
    LEAST_CAPACITY,
    LOSS_LABEL,
    MOST_LABELS,
    PROGRESS,
    costs,
    is_wide,
    loss_range,
    pareto_front,
    short_names,
    styles,
)

_HOVER = "%{text}<extra></extra>"
_MOST_TICKS = 16
_NUM_ON_CURVE = 60

Spec = dict[str, Any]


@dataclass(frozen=True)
class Interactive:
    """A figure. key: unique within the page. control: what its choices are of."""

    key: str
    title: str
    spec: Spec
    notes: list[str] = field(default_factory=list)
    control: str = ""


def loss_curves(group: Group, key: str) -> Interactive | None:
    """Held-out causal loss over training FLOPs, tokens and time, a curve a run."""
    runs = [run for run in group.runs if len(run.metrics.curve)]
    if not runs:
        return None
    style = styles(group.runs)
    first = {run.series: run.name for run in reversed(runs)}
    data = []
    for run in runs:
        dash = style[run.series].dash if run.is_complete else "dash"
        data.append(
            {
                **_trace(run, first[run.series] == run.name),
                "mode": "lines+markers",
                "marker": {"size": 4, "color": style[run.series].colour},
                "line": {"color": style[run.series].colour, "width": 1.6, "dash": dash},
                "y": _rounded(run.metrics.curve.loss),
                # One text a point would be most of the page.
                "meta": escape(run.name),
                "customdata": run.metrics.curve.step,
                "hovertemplate": "%{meta}<br>step %{customdata:,}: %{y:.4f} nats<extra></extra>",
            }
        )
    views = []
    for axis in PROGRESS:
        columns = [axis.values(run) for run in runs]
        if any(columns):
            ends = [column[-1] for column in columns if column]
            scale = "log" if is_wide(ends) else "linear"
            xs = [_rounded(c) for c in columns]
            views.append(_view(axis.title, xs, scale))
    layout = _layout(LOSS_LABEL, with_legend=len(first) <= MOST_LABELS)
    layout["yaxis"] |= {"range": _rounded(loss_range(runs))}
    notes = ["The first fifth of a run may lie above the picture: a double click shows all of it."]
    notes += ["Time is of training steps: without evaluations, checkpoints and lost work."]
    if any(not run.is_complete for run in runs):
        notes.append("Dashed: not complete.")
    return Interactive(
        key, "Loss while training", {"data": data, "layout": layout, "views": views}, notes
    )


def final_losses(group: Group, key: str) -> Interactive | None:
    """Final causal loss over forward FLOPs and step time, with the Pareto front of the runs."""
    runs, style = group.runs, styles(group.runs)
    axes = costs(runs)
    if not axes:
        return None
    first = {run.series: run.name for run in reversed(runs)}
    data = []
    for run in runs:
        symbol = "circle" if run.is_complete else "circle-open"
        data.append(
            {
                **_trace(run, first[run.series] == run.name),
                "mode": "markers",
                "marker": {"size": 9, "color": style[run.series].colour, "symbol": symbol},
                "y": [round(run.loss, 6)],
                "text": [f"{escape(run.name)}<br>{run.loss:.4f} nats"],
            }
        )
    front_trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "Pareto front",
        "hoverinfo": "skip",
    }
    front_style = {"line": {"color": "#778692", "width": 1.2, "shape": "hv"}, "x": [], "y": []}
    front_style |= {"marker": {"symbol": "circle-open", "size": 15, "color": "#778692"}}
    data.append({**front_trace, **front_style})
    views = []
    for axis in axes:
        points = {r.name: (axis.values[r.name], r.loss) for r in runs if r.name in axis.values}
        front = [points[name] for name in pareto_front(points)]
        xs = [_rounded([axis.values[r.name]]) if r.name in points else [] for r in runs]
        ys = [[round(run.loss, 6)] for run in runs]
        scale = "log" if is_wide(list(axis.values.values())) else "linear"
        view = _view(axis.title, [*xs, _rounded(x for x, _ in front)], scale)
        views.append({**view, "y": [*ys, _rounded(y for _, y in front)]})
    layout = _layout(LOSS_LABEL, with_legend=len(first) <= MOST_LABELS)
    spec = {"data": data, "layout": layout, "views": views}
    return Interactive(key, "Final loss against cost", spec, cost_notes(runs))


def cost_notes(runs: Sequence[Run]) -> list[str]:
    """Return what keeps final losses, or step times, from being compared at once."""
    notes = [
        "No run of lower cost has a lower loss than one on the Pareto front. Forward FLOPs are as"
        " executed in the causal decision, step times medians of a run's second half."
    ]
    flops = [run.flops for run in runs]
    if max(flops) > 1.02 * min(flops):
        notes.append(
            "Training FLOPs are not equal: more of them lower the loss as well"
            f" ({min(flops):.3g} to {max(flops):.3g})."
        )
    if len({(run.machine, str(run.config.get("batch.tokens"))) for run in runs}) > 1:
        notes.append("Machines or batches differ: step times are not of the same work.")
    return notes


def capacity_map(runs: Sequence[Run], key: str) -> Interactive | None:
    """Capacity of each layer and run, in colour."""
    known = [run for run in runs if run.capacities]
    if not any(run.is_routed for run in known):
        return None
    num_layers = max(len(run.capacities) for run in known)
    values: list[list[float | None]] = []
    texts = []
    for layer in range(num_layers):
        row = [_capacity_at(run, layer) for run in known]
        values.append([None if c is None else _log(max(c, LEAST_CAPACITY)) for c in row])
        texts.append(
            [
                f"{escape(run.name)}<br>layer {layer}: {'no such layer' if c is None else f'{c:g}'}"
                for run, c in zip(known, row, strict=True)
            ]
        )
    ticks = [c for c in (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64) if c >= LEAST_CAPACITY]
    trace = {
        **_heat(values, texts, "share of the tokens", "Viridis"),
        **{"zmin": math.log2(LEAST_CAPACITY), "zmax": 0},
    }
    labels = [f"1/{round(1 / c)}" if c < 1 else "1" for c in ticks]
    trace["colorbar"] |= {"tickvals": [math.log2(c) for c in ticks], "ticktext": labels}
    layout = _map_layout([run.name for run in known], [str(i) for i in range(num_layers)], "layer")
    return Interactive(key, "Capacity of each layer", {"data": [trace], "layout": layout})


def router_health(runs: Sequence[Run], key: str) -> Interactive | None:
    """Mean gate and relative size of the updates of a run's routers, over training tokens."""
    routed = sorted((run for run in runs if run.metrics.routers), key=lambda run: run.loss)
    choices = [{"label": run.name, "data": _health_of(run)} for run in routed]
    if not choices:
        return None
    layout = _layout("mean gate", with_legend=True) | {"height": 520}
    layout["yaxis"] |= {"domain": [0.54, 1]}
    layout["xaxis"] = {"title": {"text": "training tokens"}, "anchor": "y2", "automargin": True}
    title = {"text": "update over stream"}
    layout["yaxis2"] = {"title": title, "domain": [0, 0.46], "automargin": True}
    notes = ["The runs are listed by their loss, the lowest first."]
    return Interactive(key, "Router health", {"choices": choices, "layout": layout}, notes, "run")


def _health_of(run: Run) -> list[Spec]:
    data: list[Spec] = []
    for place, (label, history) in enumerate(sorted(run.metrics.routers.items())):
        colour = COLOURS[place % len(COLOURS)]
        both = (("gate", history.gate, "y"), ("update", history.update, "y2"))
        for name, values, axis in both:
            data.append(
                {
                    **{"type": "scatter", "mode": "lines", "name": label, "legendgroup": label},
                    **{"showlegend": name == "gate", "yaxis": axis},
                    "hovertemplate": f"{label}: {name} %{{y:.3g}}<extra></extra>",
                    "line": {"color": colour, "width": 1.6},
                    "x": _rounded(history.tokens),
                    "y": _rounded(values),
                }
            )
    return data


def worth_map(runs: Sequence[Run], key: str) -> Interactive | None:
    """Relative change of the loss without each router's updates, by router and run."""
    known = [run for run in runs if run.worth]
    labels = sorted({label for run in known for label in run.worth})
    if not known:
        return None
    rows = [[_percent(run.worth.get(label)) for run in known] for label in labels]
    if any(run.routed_worth is not None for run in known):
        labels.append("all")
        rows.append([_percent(run.routed_worth) for run in known])
    texts = [
        [
            f"{escape(run.name)}<br>{label}: " + ("not known" if v is None else f"{v:+.3f}%")
            for run, v in zip(known, row, strict=True)
        ]
        for label, row in zip(labels, rows, strict=True)
    ]
    trace = _heat(rows, texts, "% of the loss", "RdBu") | {"zmid": 0}
    layout = _map_layout([run.name for run in known], labels, "")
    notes = ["How the causal loss changes without the updates of a router: about 0 is off."]
    title = "What each router is worth"
    return Interactive(key, title, {"data": [trace], "layout": layout}, notes)


def swap_changes(runs: Sequence[Run], key: str) -> Interactive | None:
    """Change of the loss under other choices of tokens, with intervals, by run."""
    swapped = [run for run in runs if run.swaps]
    if not swapped:
        return None
    choices = [{"label": run.name, "data": [_swaps_of(run)]} for run in swapped]
    most = max(len(run.swaps) for run in swapped)
    layout = _layout("", with_legend=False) | {"height": 160 + 26 * most}
    layout["xaxis"] = {"title": {"text": "change of the causal loss (%)"}, "automargin": True}
    layout["yaxis"] |= {"autorange": "reversed"}
    notes = ["By modtrain eval swap=true; bars are 95% intervals over sequences."]
    title = "Loss under other choices of tokens"
    return Interactive(key, title, {"choices": choices, "layout": layout}, notes, "run")


def _swaps_of(run: Run) -> Spec:
    swaps = run.swaps
    names = [
        f"{swap.choice}, {swap.gate} gate"
        if swap.router == "all"
        else f"{swap.choice} {swap.router}"
        for swap in swaps
    ]
    above = [100 * (swap.high - swap.change) for swap in swaps]
    below = [100 * (swap.change - swap.low) for swap in swaps]
    error = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    return {
        **{"type": "scatter", "mode": "markers", "hovertemplate": _HOVER},
        "x": _rounded(100 * swap.change for swap in swaps),
        "y": [escape(name) for name in names],
        "error_x": error | {"color": COLOURS[0]},
        "marker": {"size": 8, "color": COLOURS[0]},
        "text": [
            f"{escape(name)}: {swap.change:+.3%} ({swap.low:+.3%} to {swap.high:+.3%})"
            for name, swap in zip(names, swaps, strict=True)
        ],
    }


def isoflop_curves(grid: Grid, key: str) -> Interactive:
    """Loss over N at each budget of a family, with the law, its band and the parabolas."""
    counted = f" ({grid.parameters})" if grid.parameters else ""
    layout = _layout(LOSS_LABEL, with_legend=True)
    layout["xaxis"] = {"type": "log", "title": {"text": f"parameters N{counted}"}}
    title = f"IsoFLOP curves of {grid.name}"
    if grid.fit is None:
        points = grid.points.by_family()
        choices = [
            {"label": name, "data": [_points_trace("points", p.N_P, p.loss_P, COLOURS[0])]}
            for name, p in points.items()
        ]
        reason = " ".join(grid.reason.split())
        spec = {"choices": choices, "layout": layout}
        return Interactive(key, title, spec, [*grid.notes, f"No law is drawn: {reason}"], "family")
    level = grid.fit.config.level
    choices = [
        {"label": name, "data": _family_traces(family, level)}
        for name, family in grid.fit.families.items()
    ]
    notes = [
        f"Lines are the law, bands its {level:.0%} interval, stars its optimum. Dotted: parabolas,"
        " which are biased (arXiv 2603.22339).",
        *grid.notes,
        *grid.fit.warnings,
        *(
            f"{refusal.family}: no {refusal.part}: {refusal.reason}"
            for refusal in grid.fit.refusals
        ),
    ]
    return Interactive(key, title, {"choices": choices, "layout": layout}, notes, "family")


def _family_traces(family: FamilyFit, level: float) -> list[Spec]:
    points = family.points
    data = []
    for place, (C, rows) in enumerate(family.groups.items()):
        colour = COLOURS[place % len(COLOURS)]
        N = points.N_P[rows]
        name = f"{C:.3g} FLOPs"
        grid = np.geomspace(N.min() / 1.3, N.max() * 1.3, _NUM_ON_CURVE)
        data += _band(family, C, grid, level, colour)
        tokens = family.frontier.rule.tokens(grid, C)
        law = _line(grid, family.fit.law.loss(grid, tokens), colour, "solid")
        data += [law, _points_trace(name, N, points.loss_P[rows], colour)]
        for parabola in family.parabolas:
            if parabola.C == C:
                inner = np.geomspace(N.min(), N.max(), _NUM_ON_CURVE)
                data.append(_line(inner, parabola.loss_at(inner), colour, "dot"))
    alone = np.setdiff1d(np.arange(len(points)), np.concatenate([*family.groups.values(), [-1]]))
    if len(alone):
        N, loss = points.N_P[alone], points.loss_P[alone]
        data.append(_points_trace("other FLOPs", N, loss, "#778692"))
    best = [(o.N.value, o.loss.value) for o in family.optima if o.num_points and o.N.value]
    if best:
        sizes, losses = zip(*best, strict=True)
        star = _points_trace("optimum by the law", sizes, losses, "#778692")
        data.append(star | {"marker": {"size": 12, "symbol": "star", "color": "#778692"}})
    return data


def _band(family: FamilyFit, C: float, grid: Any, level: float, colour: str) -> list[Spec]:
    laws, rule = family.frontiers.law, family.frontier.rule
    if not np.size(laws.E):
        return []
    with np.errstate(all="ignore"):
        losses = np.stack([laws.loss(N, rule.tokens(N, C)) for N in grid])
    ends = np.quantile(losses, [(1 - level) / 2, (1 + level) / 2], axis=1)
    if not np.isfinite(ends).all():
        return []
    style = {"type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False}
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    fill = {"fill": "toself", "fillcolor": f"rgba({red},{green},{blue},0.2)", "line": {"width": 0}}
    x = [*_rounded(grid), *_rounded(grid[::-1])]
    return [{**style, **fill, "x": x, "y": [*_rounded(ends[0]), *_rounded(ends[1][::-1])]}]


def _line(x: Any, y: Any, colour: str, dash: str) -> Spec:
    style = {"type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False}
    line = {"color": colour, "width": 1.5, "dash": dash}
    return {**style, "line": line, "x": _rounded(x), "y": _rounded(y)}


def _points_trace(name: str, x: Any, y: Any, colour: str) -> Spec:
    return {
        **{"type": "scatter", "mode": "markers", "name": name, "hovertemplate": _HOVER},
        "marker": {"size": 7, "color": colour},
        "x": _rounded(x),
        "y": _rounded(y),
        "text": [f"{name}<br>N = {a:.4g}: {b:.4f} nats" for a, b in zip(x, y, strict=True)],
    }


def escape(text: str) -> str:
    """Return text as Plotly shows it letter by letter: it reads some tags, and formulas in $."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def _trace(run: Run, is_first: bool) -> Spec:
    """What the traces of a run share; the first of a series stands for it in the legend."""
    return {
        "type": "scatter",
        "name": escape(run.series),
        "legendgroup": run.series,
        "showlegend": is_first,
        "hovertemplate": _HOVER,
    }


def _view(label: str, xs: list[list[float | None]], scale: str) -> Spec:
    return {"label": label, "x": xs, "scale": scale}


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


def _layout(y_title: str, *, with_legend: bool) -> Spec:
    return {
        "height": 460,
        "margin": {"l": 56, "r": 12, "t": 12, "b": 48},
        "hovermode": "closest",
        "showlegend": with_legend,
        "legend": {"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0},
        "xaxis": {"automargin": True},
        "yaxis": {"title": {"text": y_title}, "automargin": True},
    }


def _map_layout(names: Sequence[str], rows: Sequence[str], title: str) -> Spec:
    layout = _layout(title, with_legend=False)
    is_named = len(names) <= _MOST_TICKS
    layout["height"] = (220 if is_named else 120) + 22 * min(len(rows), 40)
    layout["margin"] |= {"t": 64}
    layout["xaxis"] |= {"showgrid": False, "zeroline": False, "showticklabels": False}
    layout["xaxis"] |= {"ticks": "", "tickangle": -45, "title": {"text": f"{len(names)} runs"}}
    if is_named:
        shown = {"tickvals": list(range(len(names))), "showticklabels": True, "title": {}}
        layout["xaxis"] |= shown | {"ticktext": [escape(name) for name in short_names(names)]}
    step = -(-len(rows) // 24)
    layout["yaxis"] |= {"showgrid": False, "zeroline": False}
    layout["yaxis"] |= {"tickvals": list(range(0, len(rows), step)), "ticktext": list(rows[::step])}
    return layout


def _heat(z: list[list[float | None]], texts: list[list[str]], title: str, scale: str) -> Spec:
    bar = {"orientation": "h", "thickness": 10, "y": 1.02, "yanchor": "bottom", "len": 1}
    return {
        **{"type": "heatmap", "z": z, "text": texts, "hovertemplate": _HOVER, "xgap": 1, "ygap": 1},
        **{"colorscale": scale, "colorbar": bar | {"title": {"text": title, "side": "top"}}},
    }


def _capacity_at(run: Run, layer: int) -> float | None:
    if layer >= len(run.capacities):
        return None
    capacity = run.capacities[layer]
    return 1.0 if capacity is None else capacity


def _log(value: float) -> float:
    return round(math.log2(value), 4)


def _percent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 5)


def _rounded(values: Iterable[float | None]) -> list[float | None]:
    """Return numbers with six digits, and None for what is not finite."""
    return [
        float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
        for value in values
    ]
