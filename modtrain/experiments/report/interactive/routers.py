"""Capacities, router health, and what routers are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence

from modtrain.experiments.report.interactive.specs import (
    HOVER,
    Interactive,
    Spec,
    escape,
    heat_trace,
    log2_rounded,
    make_layout,
    make_map_layout,
    rounded,
    to_percent,
)
from modtrain.experiments.report.runs import Run
from modtrain.experiments.report.series import COLOURS, LEAST_CAPACITY


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
        values.append([None if c is None else log2_rounded(max(c, LEAST_CAPACITY)) for c in row])
        texts.append(
            [
                f"{escape(run.name)}<br>layer {layer}: {'no such layer' if c is None else f'{c:g}'}"
                for run, c in zip(known, row, strict=True)
            ]
        )
    ticks = [c for c in (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64) if c >= LEAST_CAPACITY]
    trace = {
        **heat_trace(values, texts, "share of the tokens", "Viridis"),
        **{"zmin": math.log2(LEAST_CAPACITY), "zmax": 0},
    }
    labels = [f"1/{round(1 / c)}" if c < 1 else "1" for c in ticks]
    trace["colorbar"] |= {"tickvals": [math.log2(c) for c in ticks], "ticktext": labels}
    layout = make_map_layout(
        [run.name for run in known], [str(i) for i in range(num_layers)], "layer"
    )
    return Interactive(key, "Capacity of each layer", {"data": [trace], "layout": layout})


def router_health(runs: Sequence[Run], key: str) -> Interactive | None:
    """Mean gate and relative size of the updates of a run's routers, over training tokens."""
    routed = sorted((run for run in runs if run.metrics.routers), key=lambda run: run.loss)
    choices = [{"label": run.name, "data": _health_of(run)} for run in routed]
    if not choices:
        return None
    layout = make_layout("mean gate", with_legend=True) | {"height": 520}
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
                    "x": rounded(history.tokens),
                    "y": rounded(values),
                }
            )
    return data


def worth_map(runs: Sequence[Run], key: str) -> Interactive | None:
    """Relative change of the loss without each router's updates, by router and run."""
    known = [run for run in runs if run.worth]
    labels = sorted({label for run in known for label in run.worth})
    if not known:
        return None
    rows = [[to_percent(run.worth.get(label)) for run in known] for label in labels]
    if any(run.routed_worth is not None for run in known):
        labels.append("all")
        rows.append([to_percent(run.routed_worth) for run in known])
    texts = [
        [
            f"{escape(run.name)}<br>{label}: " + ("not known" if v is None else f"{v:+.3f}%")
            for run, v in zip(known, row, strict=True)
        ]
        for label, row in zip(labels, rows, strict=True)
    ]
    trace = heat_trace(rows, texts, "% of the loss", "RdBu") | {"zmid": 0}
    layout = make_map_layout([run.name for run in known], labels, "")
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
    layout = make_layout("", with_legend=False) | {"height": 160 + 26 * most}
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
        **{"type": "scatter", "mode": "markers", "hovertemplate": HOVER},
        "x": rounded(100 * swap.change for swap in swaps),
        "y": [escape(name) for name in names],
        "error_x": error | {"color": COLOURS[0]},
        "marker": {"size": 8, "color": COLOURS[0]},
        "text": [
            f"{escape(name)}: {swap.change:+.3%} ({swap.low:+.3%} to {swap.high:+.3%})"
            for name, swap in zip(names, swaps, strict=True)
        ],
    }


def _capacity_at(run: Run, layer: int) -> float | None:
    if layer >= len(run.capacities):
        return None
    capacity = run.capacities[layer]
    return 1.0 if capacity is None else capacity
