"""Losses over training, and final losses over costs."""

from __future__ import annotations

from collections.abc import Sequence

from modtrain.experiments.report.collect import Group
from modtrain.experiments.report.interactive.specs import (
    Interactive,
    escape,
    make_layout,
    make_view,
    rounded,
    run_trace,
)
from modtrain.experiments.report.runs import Run
from modtrain.experiments.report.series import (
    LOSS_LABEL,
    MOST_LABELS,
    PROGRESS,
    costs,
    is_wide,
    loss_range,
    pareto_front,
    styles,
)


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
                **run_trace(run, first[run.series] == run.name),
                "mode": "lines+markers",
                "marker": {"size": 4, "color": style[run.series].colour},
                "line": {"color": style[run.series].colour, "width": 1.6, "dash": dash},
                "y": rounded(run.metrics.curve.loss),
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
            xs = [rounded(c) for c in columns]
            views.append(make_view(axis.title, xs, scale))
    layout = make_layout(LOSS_LABEL, with_legend=len(first) <= MOST_LABELS)
    layout["yaxis"] |= {"range": rounded(loss_range(runs))}
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
                **run_trace(run, first[run.series] == run.name),
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
        xs = [rounded([axis.values[r.name]]) if r.name in points else [] for r in runs]
        ys = [[round(run.loss, 6)] for run in runs]
        scale = "log" if is_wide(list(axis.values.values())) else "linear"
        view = make_view(axis.title, [*xs, rounded(x for x, _ in front)], scale)
        views.append({**view, "y": [*ys, rounded(y for _, y in front)]})
    layout = make_layout(LOSS_LABEL, with_legend=len(first) <= MOST_LABELS)
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
