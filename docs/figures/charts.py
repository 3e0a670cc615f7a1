"""Charts in light and dark colours, with text that a browser sets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from drawing import COLOURS
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[1] / "reports/results.md"


def _theme(mode: int) -> dict[str, Any]:
    ink, muted = COLOURS["ink"][mode], COLOURS["muted"][mode]
    inked = "text.color", "axes.labelcolor", "xtick.color", "ytick.color"
    return {
        **dict.fromkeys(inked, ink),
        "axes.edgecolor": muted,
        "grid.color": muted,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "legend.facecolor": "none",
        "legend.edgecolor": muted,
        "svg.fonttype": "none",
        "svg.hashsalt": "modtrain",
        "font.family": "sans-serif",
        "font.size": 11,
        "axes.prop_cycle": _cycle(mode),
    }


def _cycle(mode: int) -> Any:
    from matplotlib import cycler

    return cycler(color=[COLOURS[name][mode] for name in ("blue", "orange", "green", "muted")])


THEMES = {"light": _theme(0), "dark": _theme(1)}


def save_chart(figure: Figure, path: Path) -> None:
    """Write a chart as SVG, the same bytes each time."""
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})


def sweep_chart(results: dict[float, dict[str, float]], folder: Path) -> None:
    """Draw final causal loss against forward FLOPs a token, a point for each capacity."""
    for mode, theme in THEMES.items():
        with rc_context(theme):
            figure = Figure(figsize=(5.4, 3.6))
            axes: Axes = figure.subplots()
            flops = [values["held_out/causal_flops_per_token"] / 1e6 for values in results.values()]
            losses = [values["held_out/causal_loss"] for values in results.values()]
            axes.plot(flops, losses, marker="o", ms=7)
            for x, y, capacity in zip(flops, losses, results, strict=True):
                axes.annotate(f"{capacity:.4g}", (x, y), (6, -14), textcoords="offset points")
            axes.set_xlabel("forward MFLOPs a token, executed")
            axes.set_ylabel("held-out causal loss (nats a token)")
            axes.margins(0.18)
            axes.grid(alpha=0.25)
            save_chart(figure, folder / f"sweep-{mode}.svg")


def results_chart(folder: Path) -> None:
    """Draw the table of the results page: each arm's loss over MoD's against its steps."""
    row = re.compile(r"^\| `(\w+)`.*?\| ([+-][\d.]+) ± ([\d.]+)% \|.*\| ([\d,]+) \|$", re.MULTILINE)
    arms = row.findall(RESULTS.read_text())
    for mode, theme in THEMES.items():
        with rc_context(theme):
            figure = Figure(figsize=(5.4, 6.2))
            axes: Axes = figure.subplots()
            ordered = sorted(arms, key=lambda arm: float(arm[1]), reverse=True)
            names = [f"{name} ({steps})" for name, _, _, steps in ordered]
            changes = [float(change) for _, change, _, _ in ordered]
            errors = [2 * float(error) for _, _, error, _ in ordered]
            axes.axvline(0, color=theme["axes.edgecolor"], lw=1)
            axes.errorbar(changes, range(len(names)), xerr=errors, fmt="o", capsize=2)
            axes.set_yticks(range(len(names)), names)
            axes.set_xlabel("causal loss over mod's, % (two standard errors)")
            axes.set_title("equal training FLOPs; steps in brackets", fontsize=11)
            axes.grid(alpha=0.25, axis="x")
            save_chart(figure, folder / f"results-{mode}.svg")
