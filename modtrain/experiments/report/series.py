"""What all figures of a report share: the colour of each series, short names, Pareto fronts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modtrain.experiments.report.runs import Run

LOSS_LABEL = "held-out causal loss (nats a token)"
LEAST_CAPACITY = 1 / 64
"""Capacities below this have the colour of this."""
# Each has a contrast of 3 with a white and with a dark page.
COLOURS = (
    *("#2f7ed8", "#d9660f", "#1f9453", "#d64550", "#8e63ce"),
    *("#a3693f", "#cf4fa8", "#778692", "#8c8614", "#0f94a6"),
)
DASHES = ("solid", "dot", "dashdot", "longdash")
# More would be longer than the figure.
MOST_LABELS = 12
_LONGEST_LABEL = 22


@dataclass(frozen=True)
class Style:
    """How the runs of a series are drawn. dash: as Plotly names it."""

    colour: str
    dash: str


def styles(runs: Sequence[Run]) -> dict[str, Style]:
    """Return the style of each series, in the order of its first run."""
    names = dict.fromkeys(run.series for run in runs)
    return {
        name: Style(COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)])
        for i, name in enumerate(names)
    }


def short_names(names: Sequence[str]) -> list[str]:
    """Return the names without the folders that all share, cut to what an axis has room for."""
    shared = os.path.commonpath(names) if len(names) > 1 else names[0].rpartition("/")[0]
    cut = [name.removeprefix(f"{shared}/") if shared else name for name in names]
    return [c if len(c) <= _LONGEST_LABEL else f"…{c[1 - _LONGEST_LABEL :]}" for c in cut]


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the points that no other beats in one of (cost, loss) and equals in the other.

    By cost; of equal points the first.
    """
    front: list[str] = []
    lowest = float("inf")
    for name, (_, loss) in sorted(points.items(), key=lambda item: item[1]):
        if loss < lowest:
            front.append(name)
            lowest = loss
    return front


@dataclass(frozen=True)
class Cost:
    """An axis that final losses are drawn over, and the runs for which it is known."""

    key: str
    title: str
    values: dict[str, float]


def costs(runs: Sequence[Run]) -> list[Cost]:
    """Return the costs that some runs have: forward FLOPs, and measured step time."""
    kinds = [
        (
            "forward_flops",
            "forward FLOPs a token (causal)",
            {run.name: run.causal_forward_flops for run in runs},
        ),
        (
            "step_time",
            "seconds a training step",
            {run.name: run.metrics.step_seconds for run in runs},
        ),
    ]
    every_cost = [
        Cost(key, title, {name: value for name, value in values.items() if value})
        for key, title, values in kinds
    ]
    return [cost for cost in every_cost if cost.values]


@dataclass(frozen=True)
class Progress:
    """An axis that curves are drawn over: an attribute of `Curve`, and what to divide it by."""

    key: str
    title: str
    unit: float = 1.0

    def values(self, run: Run) -> list[float]:
        """Return where each evaluation of ``run`` was; empty where it is not known."""
        values = getattr(run.metrics.curve, self.key)
        return [] if None in values else [value / self.unit for value in values]


PROGRESS = (
    Progress("flops", "training FLOPs"),
    Progress("tokens", "training tokens"),
    Progress("seconds", "hours of training steps", 3600.0),
)


def is_wide(values: Sequence[float]) -> bool:
    """Whether positive values span so much that their axis is to be logarithmic."""
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) > 3 * min(positive)


def loss_range(runs: Sequence[Run]) -> tuple[float, float]:
    """Return the losses that curves are shown between: those of the first steps dwarf the rest."""
    curves = [run.metrics.curve.loss for run in runs]
    low = min(min(losses) for losses in curves)
    # What each still has above its first fifth.
    high = max(max(losses[len(losses) // 5 :]) for losses in curves)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin
