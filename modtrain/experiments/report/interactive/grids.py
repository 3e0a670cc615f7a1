"""IsoFLOP curves with the fitted law, its band and the parabolas."""

from __future__ import annotations

from typing import Any

import numpy as np

from modtrain.experiments.fit.results import FamilyFit
from modtrain.experiments.report.grids import Grid
from modtrain.experiments.report.interactive.specs import (
    Interactive,
    Spec,
    line_trace,
    make_layout,
    points_trace,
    rounded,
)
from modtrain.experiments.report.series import COLOURS, LOSS_LABEL

_NUM_ON_CURVE = 60


def isoflop_curves(grid: Grid, key: str) -> Interactive:
    """Loss over N at each budget of a family, with the law, its band and the parabolas."""
    counted = f" ({grid.parameters})" if grid.parameters else ""
    layout = make_layout(LOSS_LABEL, with_legend=True)
    layout["xaxis"] = {"type": "log", "title": {"text": f"parameters N{counted}"}}
    title = f"IsoFLOP curves of {grid.name}"
    if grid.fit is None:
        points = grid.points.by_family()
        choices = [
            {"label": name, "data": [points_trace("points", p.N_P, p.loss_P, COLOURS[0])]}
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
        law = line_trace(grid, family.fit.law.loss(grid, tokens), colour, "solid")
        data += [law, points_trace(name, N, points.loss_P[rows], colour)]
        for parabola in family.parabolas:
            if parabola.C == C:
                inner = np.geomspace(N.min(), N.max(), _NUM_ON_CURVE)
                data.append(line_trace(inner, parabola.loss_at(inner), colour, "dot"))
    alone = np.setdiff1d(np.arange(len(points)), np.concatenate([*family.groups.values(), [-1]]))
    if len(alone):
        N, loss = points.N_P[alone], points.loss_P[alone]
        data.append(points_trace("other FLOPs", N, loss, "#778692"))
    best = [(o.N.value, o.loss.value) for o in family.optima if o.num_points and o.N.value]
    if best:
        sizes, losses = zip(*best, strict=True)
        star = points_trace("optimum by the law", sizes, losses, "#778692")
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
    x = [*rounded(grid), *rounded(grid[::-1])]
    return [{**style, **fill, "x": x, "y": [*rounded(ends[0]), *rounded(ends[1][::-1])]}]
