"""A picture of a search: losses over forward FLOPs with the front, and the patterns themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from modtrain.common.atomic_io import atomic_writer
from modtrain.experiments.pattern_search.results import Results

FIGURE = "patterns.png"


def draw(results: Results, path: Path) -> None:
    """Draw loss over forward FLOPs, a colour a rung, beside a map layer x candidate, as PNG."""
    num_candidates = len(results.entries)
    width = min(14.0, 4.0 + 0.2 * num_candidates)
    figure = Figure(figsize=(6.0 + width, 4.6))
    losses, patterns = figure.subplots(1, 2, width_ratios=[6.0, width])
    _draw_losses(results, losses)
    _draw_patterns(results, figure, patterns)
    figure.tight_layout()
    with atomic_writer(path, path.parent) as file:
        figure.savefig(file, dpi=130, format="png")


def _draw_losses(results: Results, axes: Axes) -> None:
    for rung, outcomes in enumerate(results.outcomes):
        points = [(o.forward_flops / results.dense_flops, o.loss) for o in outcomes.values()]
        if points:
            label = f"{results.config.budgets[rung]:g} training FLOPs"
            axes.plot(*zip(*points, strict=True), "o", ms=4.5, color=f"C{rung % 10}", label=label)
    last, colour = results.outcomes[-1], f"C{(len(results.outcomes) - 1) % 10}"
    front = [
        (last[name].forward_flops / results.dense_flops, last[name].loss) for name in results.front
    ]
    axes.plot(*zip(*sorted(front), strict=True), color=colour, lw=1.2)
    for name in results.front:
        at = (last[name].forward_flops / results.dense_flops, last[name].loss)
        axes.annotate(name, at, xytext=(3, 4), textcoords="offset points", fontsize="x-small")
    for (name, control), marker in zip(results.controls.items(), "sD", strict=False):
        at_flops = control.forward_flops / results.dense_flops
        axes.plot(at_flops, control.loss, marker, color="black", ms=6, label=name)
    axes.set_xlabel("forward FLOPs over the dense model's")
    axes.set_ylabel("held-out causal loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


def _draw_patterns(results: Results, figure: Figure, axes: Axes) -> None:
    """Draw the capacity of each layer, the candidates from few FLOPs to many.

    Below a candidate stands how many rungs it completed; those of the front are bold.
    """
    candidates = [entries[0].candidate for entries in results.entries.values()]
    candidates.sort(key=lambda candidate: candidate.flops_over_dense)
    grid = np.array([candidate.capacities for candidate in candidates]).T
    image = axes.imshow(
        grid, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest"
    )
    rungs = [sum(c.name in outcomes for outcomes in results.outcomes) for c in candidates]
    labels = [f"{c.name} · {count}" for c, count in zip(candidates, rungs, strict=True)]
    axes.set_xticks(range(len(candidates)), labels, rotation=90, fontsize="x-small")
    for candidate, label in zip(candidates, axes.get_xticklabels(), strict=True):
        label.set_fontweight("bold" if candidate.name in results.front else "normal")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("candidate · rungs, from few forward FLOPs to many; front in bold")
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="capacity")
