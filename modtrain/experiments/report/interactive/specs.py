"""What plotly.js draws, as plain values, without colours of the page.

A figure has ``data`` and ``layout`` as Plotly has them. ``views`` are axes to choose from: each has
a ``label``, and the ``x``, maybe the ``y``, of every trace. ``choices`` replace all data instead.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from modtrain.experiments.report.runs import Run
from modtrain.experiments.report.series import short_names

HOVER = "%{text}<extra></extra>"
_MOST_TICKS = 16
Spec = dict[str, Any]


@dataclass(frozen=True)
class Interactive:
    """A figure. key: unique within the page. control: what its choices are of."""

    key: str
    title: str
    spec: Spec
    notes: list[str] = field(default_factory=list)
    control: str = ""


def escape(text: str) -> str:
    """Return text as Plotly shows it letter by letter: it reads some tags, and formulas in $."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def run_trace(run: Run, is_first: bool) -> Spec:
    """What the traces of a run share; the first of a series stands for it in the legend."""
    return {
        "type": "scatter",
        "name": escape(run.series),
        "legendgroup": run.series,
        "showlegend": is_first,
        "hovertemplate": HOVER,
    }


def make_view(label: str, xs: list[list[float | None]], scale: str) -> Spec:
    """Return axes to choose: the x of every trace."""
    return {"label": label, "x": xs, "scale": scale}


def make_layout(y_title: str, *, with_legend: bool) -> Spec:
    """Return the layout of a figure with a logarithmic or linear x by its view."""
    return {
        "height": 460,
        "margin": {"l": 56, "r": 12, "t": 12, "b": 48},
        "hovermode": "closest",
        "showlegend": with_legend,
        "legend": {"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0},
        "xaxis": {"automargin": True},
        "yaxis": {"title": {"text": y_title}, "automargin": True},
    }


def make_map_layout(names: Sequence[str], rows: Sequence[str], title: str) -> Spec:
    """Return the layout of a heat map."""
    layout = make_layout(title, with_legend=False)
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


def heat_trace(z: list[list[float | None]], texts: list[list[str]], title: str, scale: str) -> Spec:
    """Return a heat map of rows and columns."""
    bar = {"orientation": "h", "thickness": 10, "y": 1.02, "yanchor": "bottom", "len": 1}
    return {
        **{"type": "heatmap", "z": z, "text": texts, "hovertemplate": HOVER, "xgap": 1, "ygap": 1},
        **{"colorscale": scale, "colorbar": bar | {"title": {"text": title, "side": "top"}}},
    }


def log2_rounded(value: float) -> float:
    """Return the logarithm to base 2, with four digits."""
    return round(math.log2(value), 4)


def to_percent(value: float | None) -> float | None:
    """Return a share in percent."""
    return None if value is None else round(100 * value, 5)


def rounded(values: Iterable[float | None]) -> list[float | None]:
    """Return numbers with six digits, and None for what is not finite."""
    return [
        float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
        for value in values
    ]


def line_trace(x: Any, y: Any, colour: str, dash: str) -> Spec:
    """Return a line without a legend."""
    style = {"type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False}
    line = {"color": colour, "width": 1.5, "dash": dash}
    return {**style, "line": line, "x": rounded(x), "y": rounded(y)}


def points_trace(name: str, x: Any, y: Any, colour: str) -> Spec:
    """Return markers with texts."""
    return {
        **{"type": "scatter", "mode": "markers", "name": name, "hovertemplate": HOVER},
        "marker": {"size": 7, "color": colour},
        "x": rounded(x),
        "y": rounded(y),
        "text": [f"{name}<br>N = {a:.4g}: {b:.4f} nats" for a, b in zip(x, y, strict=True)],
    }
