"""Results of tasks as a table, TensorBoard scalars and curves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from modtrain.common.atomic_io import atomic_writer
from modtrain.common.terminal import plain_console
from modtrain.inference.evaluate.reporting import Point
from modtrain.training.tensorboard.tags import TASKS

_MAX_COLUMNS = 3
# The metrics that chance is known for, and those that a curve shows where a task has several.
_OF_CHOICES = ("acc", "acc_norm")
_SHOWN_FIRST = ("acc", "exact_match", "bits_per_byte")


def show_tasks(results: dict[str, Any]) -> None:
    """Print the results of `evaluate_tasks`: the decision, the compute budget, and every score."""
    console = plain_console()
    budget = format_budget(results)
    heading = f"tasks by lm-eval {results['lm_eval']}, step {results['step']:,}"
    shots = {task["num_fewshot"] for task in results.get("tasks", {}).values()} - {None, 0}
    if shots:
        heading += f", few-shot {', '.join(map(str, sorted(shots)))}"
    # As a title it would be wrapped to the table's width.
    console.print(f"{heading}, decision {results['decision']}, {budget}", soft_wrap=True)
    if "points" not in results:
        console.print(_scores(results["tasks"]))
        return
    console.print(_sweep(results))


def format_budget(results: dict[str, Any]) -> str:
    """Say what the compute budget changes; one that a sweep sets is in its rows."""
    budget = results["budget"] or {}
    if not budget:
        return "as trained"
    return ", ".join(f"{name}={value:g}" for name, value in budget.items())


def main_metric(task: dict[str, Any]) -> str:
    """Return the metric that a curve shows."""
    names = [*_SHOWN_FIRST, *task["metrics"]]
    return next((name for name in names if name in task["metrics"]), "")


def _scores(tasks: dict[str, Any]) -> Table:
    headings = ("task", "metric", "score", "", "chance", "examples", "forward FLOPs")
    table = _table(headings, texts=2)
    for name, task in tasks.items():
        for row, (metric, score) in enumerate(task["metrics"].items()):
            is_chance = metric in _OF_CHOICES and task["chance"] is not None
            table.add_row(
                name if row == 0 else "",
                metric,
                f"{score['value']:.4f}",
                _number(score["stderr"], "±{:.4f}"),
                f"{task['chance']:.4f}" if is_chance else "",
                _number(task["num_examples"], "{:,}"),
                f"{task['flops']:,.0f}",
            )
    return table


def _table(headings: Sequence[str], texts: int) -> Table:
    """Return a table whose first columns have texts, and the others numbers."""
    table = Table()
    for number, name in enumerate(headings):
        justify: Literal["left", "right"] = "left" if number < texts else "right"
        table.add_column(name, justify=justify, no_wrap=number < texts)
    return table


def _number(value: Any, form: str) -> str:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return form.format(value) if is_number else ""


def _sweep(results: dict[str, Any]) -> Table:
    headings = ("task", "capacity", "metric", "realised", "score", "forward FLOPs", "of dense")
    table = _table(headings, texts=3)
    for name in results["as_trained"]:
        for label, task in _curve(results, name):
            metric = main_metric(task)
            shares = task["realised_capacity"].values()
            table.add_row(
                name,
                label,
                metric,
                f"{sum(shares) / len(shares):.4f}" if shares else "",
                _number(task["metrics"].get(metric, {}).get("value"), "{:.4f}"),
                f"{task['flops']:,.0f}",
                f"{task['flops'] / task['dense_equivalent_flops']:.3f}",
            )
        table.add_section()
    return table


def _curve(results: dict[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the results of a task, by capacity, and last as trained."""
    for point in results["points"]:
        yield f"{point['capacity']:g}", point["tasks"][name]
    yield "as trained", results["as_trained"][name]


def task_points(results: dict[str, Any]) -> Iterator[Point]:
    """Yield scores as ``validation/tasks/<task>/<metric>``, at the checkpoint's step.

    Those of a sweep are over executed forward FLOPs a token. TensorBoard's step is an integer: it
    is in thousands of FLOPs, as the tag says.
    """
    if "points" not in results:
        for name, task in results["tasks"].items():
            for metric, score in task["metrics"].items():
                yield f"{TASKS}{name}/{metric}", score["value"], results["step"]
        return
    for name in results["as_trained"]:
        for label, task in _curve(results, name):
            suffix = " as trained" if label == "as trained" else ""
            metric = main_metric(task)
            tag = f"{TASKS}{name}/{metric}{suffix} by kFLOPs a token"
            yield tag, task["metrics"][metric]["value"], round(task["flops"] / 1000)


def draw_task_sweep(results: dict[str, Any], path: Path) -> None:
    """Plot each task's first metric over executed forward FLOPs a token as a PNG."""
    names = [*results["as_trained"]]
    columns = min(_MAX_COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(7, 4.6 * columns), 0.5 + 4 * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    places = [axes for row in grid for axes in row]
    for axes, name in zip(places, names, strict=False):
        _draw_task(axes, name, results)
    for axes in places[len(names) :]:
        axes.set_visible(False)
    title = f"{results['run']}, step {results['step']:,}, {format_budget(results)}"
    figure.suptitle(title, fontsize="medium", parse_math=False)
    figure.tight_layout()
    with atomic_writer(path, path.parent) as file:
        figure.savefig(file, dpi=130, format="png")


def _draw_task(axes: Axes, name: str, results: dict[str, Any]) -> None:
    *points, (_, trained) = _curve(results, name)
    metric = main_metric(trained)

    def score(task: dict[str, Any]) -> float:
        return float(task["metrics"][metric]["value"])

    axes.errorbar(
        [task["flops"] for _, task in points],
        [score(task) for _, task in points],
        yerr=[task["metrics"][metric]["stderr"] or 0.0 for _, task in points],
        marker="o",
        capsize=2,
        label=f"{results['decision']}, by capacity",
    )
    for label, task in points:
        place = (task["flops"], score(task))
        axes.annotate(label, place, (4, 4), textcoords="offset points", fontsize="small")
    axes.plot(trained["flops"], score(trained), "*", ms=13, color="C1", label="as trained")
    if trained["chance"] is not None and metric in _OF_CHOICES:
        axes.axhline(trained["chance"], ls=":", color="grey", label="chance")
    # A line of FLOPs alone: the score of a dense model is not known.
    axes.axvline(trained["dense_equivalent_flops"], ls="--", color="grey", label="FLOPs if dense")
    axes.set_title(name, fontsize="medium", parse_math=False)
    axes.set_xlabel("forward FLOPs a token, executed")
    axes.set_ylabel(metric.replace("_", " "))
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
