"""The results of a grid as a table of points, a CSV file and a figure."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from modtrain.common.atomic_io import atomic_writer, write_text
from modtrain.experiments.isoflop.config import CONVENTIONS
from modtrain.experiments.isoflop.grid import Grid, Point
from modtrain.experiments.sweep.job_process import failure_text, state_of
from modtrain.models.flops import TRAINING_OVER_FORWARD, active_parameters, parameters
from modtrain.training.metric_names import CAUSAL_LOSS
from modtrain.training.run_directory import RunDirectory

POINTS, FIGURE = "points.csv", "loss_by_size.png"
UNFINISHED = ("not started", "stopped", "running")
"""Why a point has no result yet, where nothing is wrong with it."""
_CAUSAL_FLOPS = "held_out/causal_flops_per_token"


@dataclass(frozen=True)
class Result:
    """A point whose run is complete. loss: final, held out, causal, in nats a token."""

    point: Point
    loss: float
    causal_flops_per_token: float | None

    def row(self, parameters_as: str) -> dict[str, Any]:
        """Return the point's line of the CSV file. parameters_as: what N counts."""
        point, plan, model = self.point, self.point.plan, self.point.resolved.model
        counts = parameter_counts(point)
        return {
            "family": point.family,
            "N": counts[parameters_as],
            "D": plan.tokens,
            "C": plan.flops,
            "loss": self.loss,
            "budget": point.budget,
            "size": point.size,
            "seed": point.seed,
            "run": point.config.name,
            "trunk": point.trunk or "",
            "flops_per_token": plan.flops_per_token,
            "forward_flops_per_token": plan.flops_per_token / TRAINING_OVER_FORWARD,
            "causal_forward_flops_per_token": self.causal_flops_per_token,
            **{f"N_{name}": count for name, count in counts.items()},
            "d_model": model.d_model,
            "num_layers": model.num_layers,
            "lr": point.config.optimizer.lr,
            "batch_tokens": plan.tokens_per_step,
            "steps": plan.steps,
        }


def parameter_counts(point: Point) -> dict[str, float]:
    """Return N by each of `CONVENTIONS`."""
    model, plan = point.resolved.model, point.plan
    counts: dict[str, float] = {"effective": plan.flops_per_token / 6}
    both = {"total": parameters(model), "active": active_parameters(model, plan.seq_len)}
    for name, cost in both.items():
        counts[name] = cost.total
        counts[f"{name}_non_embedding"] = cost.total - cost.embedding - cost.head
    return {name: counts[name] for name in CONVENTIONS}


def collect(points: Sequence[Point]) -> tuple[list[Result], dict[str, str]]:
    """Return the results of complete runs, and why each of the other points has none, by run."""
    results, missing = [], {}
    for point in points:
        run, name = RunDirectory.of(point.config), str(point.config.name)
        if not run.is_complete:
            state = state_of(run)
            why = failure_text(run)
            if state == "not started" and point.trunk is not None:
                why = f"; its trunk {point.trunk} is {state_of(_trunk_run(point))}"
            missing[name] = f"{state} {why}".rstrip().replace(" ;", ";")
            continue
        content = run.read_result()
        loss = content.get(CAUSAL_LOSS)
        if loss is None:
            missing[name] = "the model has no causal decision, and so no causal loss"
        else:
            results.append(Result(point, loss, content.get(_CAUSAL_FLOPS)))
    return results, missing


def _trunk_run(point: Point) -> RunDirectory:
    return RunDirectory(Path(point.config.runs_dir) / str(point.trunk))


def write_points(results: Sequence[Result], parameters_as: str, path: Path) -> None:
    """Write the points as CSV, one a run."""
    rows = [result.row(parameters_as) for result in results]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def show_lowest(results: Sequence[Result], console: Console) -> None:
    """Print for each family and budget the size with the lowest loss, a mean over the seeds."""
    table = Table(title="lowest held-out causal loss of each budget, before any fit")
    for heading in ("family", "budget", "size", "layers x width", "FLOPs a token", "loss", ""):
        table.add_column(heading, justify="left" if heading in ("family", "") else "right")
    for family, budgets in _by_family_and_budget(results).items():
        for budget, sizes in budgets.items():
            losses = {size: _mean(of_size) for size, of_size in sizes.items()}
            best = min(losses, key=lambda size: losses[size])
            point = sizes[best][0].point
            model = point.resolved.model
            ends = {min(losses): "smaller", max(losses): "larger"}
            is_at_edge = best in ends and len(losses) > 1
            side = f"at the edge: add {ends[best]} sizes" if is_at_edge else ""
            table.add_row(
                family,
                f"{budget:g}",
                f"{best:g}",
                f"{model.num_layers} x {model.d_model}",
                f"{point.plan.flops_per_token:.3e}",
                f"{losses[best]:.4f}",
                side,
            )
    console.print(table)


def draw_points(grid: Grid, results: Sequence[Result], path: Path) -> None:
    """Draw the loss over training FLOPs a token, a panel a family and a curve a budget, as PNG.

    Curves are means over the seeds, dots the single runs; a dashed line is the optimum by the rule.
    """
    families = _by_family_and_budget(results)
    budgets = sorted({result.point.budget for result in results})
    figure = Figure(figsize=(max(6.0, 3.6 * len(families)), 4.2))
    panels = figure.subplots(1, len(families), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (family, by_budget) in zip(panels, families.items(), strict=True):
        for budget, sizes in by_budget.items():
            colour = f"C{budgets.index(budget) % 10}"
            means = [(of[0].point.plan.flops_per_token, _mean(of)) for of in sizes.values()]
            axes.plot(*zip(*means, strict=True), color=colour, label=f"{budget:g} FLOPs")
            runs = [(r.point.plan.flops_per_token, r.loss) for of in sizes.values() for r in of]
            axes.plot(*zip(*runs, strict=True), "o", ms=4, color=colour)
            if optimum := grid.optima.get(family, {}).get(budget):
                axes.axvline(optimum, color=colour, ls="--", lw=0.8)
        axes.set_xscale("log")
        axes.set_title(family, fontsize="medium")
        axes.set_xlabel("training FLOPs a token")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("held-out causal loss (nats a token)")
    panels[-1].legend(fontsize="small")
    figure.tight_layout()
    with atomic_writer(path, path.parent) as file:
        figure.savefig(file, dpi=130, format="png")


def _by_family_and_budget(
    results: Sequence[Result],
) -> dict[str, dict[float, dict[float, list[Result]]]]:
    """Return the results by family, budget and size, sizes in order."""
    by_family: dict[str, dict[float, dict[float, list[Result]]]] = {}
    for result in sorted(results, key=lambda r: (r.point.budget, r.point.size)):
        budgets = by_family.setdefault(result.point.family, {})
        budgets.setdefault(result.point.budget, {}).setdefault(result.point.size, []).append(result)
    return by_family


def _mean(results: Sequence[Result]) -> float:
    return statistics.mean(result.loss for result in results)
