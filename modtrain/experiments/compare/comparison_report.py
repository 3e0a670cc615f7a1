"""A comparison as numbers, a table and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from modtrain.common.atomic_io import atomic_writer
from modtrain.experiments.compare.verdict import verdict
from modtrain.models.flops import dense_equivalent_flops, forward_flops
from modtrain.training.config import TrainConfig
from modtrain.training.metric_names import CAUSAL_FLOPS, CAUSAL_LOSS, TOP_K_LOSS
from modtrain.training.metrics_log import read_metrics
from modtrain.training.run_directory import RunDirectory

_OTHER = "held_out/causal_loss_"


def describe(
    configs: list[TrainConfig], seconds: float | None, control: str | None
) -> dict[str, Any]:
    """Return the figures of an arm whose runs, one a seed, are complete.

    Losses are means over the seeds, in nats a token; ``causal_losses`` has them one by one, by the
    seed. seconds: of a micro-batch's training step, if it was measured. control: the arm that is
    the dense model of its unrouted layers alone.
    """
    results = [RunDirectory.of(config).read_result() for config in configs]
    model, seq_len = configs[0].model, configs[0].data.seq_len or 1
    losses = [result.get(CAUSAL_LOSS) for result in results]
    others = {key.removeprefix(_OTHER) for key in results[0] if key.startswith(_OTHER)}
    return {
        "runs": [config.name for config in configs],
        "causal_loss": _mean(losses),
        "causal_loss_spread": _spread(losses),
        "causal_losses": {
            str(config.seed): loss for config, loss in zip(configs, losses, strict=True)
        },
        "causal_loss_by_decision": {
            name: _mean([result[_OTHER + name] for result in results]) for name in sorted(others)
        },
        "top_k_loss_not_causal": _mean([result.get(TOP_K_LOSS) for result in results]),
        "forward_flops_per_token": forward_flops(model, seq_len).total / seq_len,
        "causal_flops_per_token": _mean([result.get(CAUSAL_FLOPS) for result in results]),
        "dense_equivalent_flops_per_token": dense_equivalent_flops(model, seq_len).total / seq_len,
        "micro_batch_seconds": seconds,
        "is_routed": model.is_routed,
        "control": control,
        **{key: results[0][key] for key in ("steps", "tokens", "flops")},
    }


def show(report: dict[str, dict[str, Any]], margin: float, console: Console) -> None:
    """Print the report as a table, and the result in sentences.

    margin: changes of the loss within it count as none, as a share of the loss.
    """
    flops = [arm["flops"] for arm in report.values()]
    equal = "equal" if max(flops) <= 1.02 * min(flops) else "UNEQUAL"
    columns = {
        "causal loss (nats a token)": ("causal_loss", "{:.4f}"),
        "spread": ("causal_loss_spread", "{:.4f}"),
        "top-k loss, not causal": ("top_k_loss_not_causal", "{:.4f}"),
        "training FLOPs": ("flops", "{:.3e}"),
        "steps": ("steps", "{:,}"),
        "tokens": ("tokens", "{:,}"),
        "forward FLOPs a token, as trained": ("forward_flops_per_token", "{:,.0f}"),
        "forward FLOPs a token, causal": ("causal_flops_per_token", "{:,.0f}"),
        "step time of a micro-batch (ms)": ("micro_batch_seconds", "{:.1f}"),
    }
    rows: list[tuple[str, ...]] = [("", *report)]
    for title, (key, form) in columns.items():
        values = [arm[key] for arm in report.values()]
        scale = 1000 if key == "micro_batch_seconds" else 1
        if key not in ("causal_loss_spread", "micro_batch_seconds") or any(values):
            rows.append((title, *("-" if v is None else form.format(v * scale) for v in values)))
    # Many arms are rows instead of columns, or the table would be wider than a terminal.
    headings, *rows = zip(*rows, strict=True) if len(report) > 4 else rows
    table = Table(title=f"held-out loss at {equal} training FLOPs")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in verdict(report, margin):
        console.print(line, soft_wrap=True)


def draw(arms: dict[str, list[TrainConfig]], path: Path) -> None:
    """Draw held-out loss against training FLOPs as a PNG, a curve an arm's first run.

    The causal loss is above; below is how far it lies over the top-k loss of the same run, which a
    curve beside it would hide. The legend has the last values.
    """
    curves = {
        name: read_metrics(RunDirectory.of(configs[0]).metrics) for name, configs in arms.items()
    }
    gaps = {name: _points(records, _gap) for name, records in curves.items()}
    has_gaps = any(gaps.values())
    figure = Figure(figsize=(7.5, 6.5) if has_gaps else (7.5, 4.5), layout="constrained")
    ratios = [3, 1][: 1 + has_gaps]
    panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)
    upper = panels[0, 0]
    for number, (name, records) in enumerate(curves.items()):
        style = {"color": f"C{number % 10}", "ls": ("-", "--", "-.")[number // 10 % 3]}
        if points := _points(records, lambda record: record.get(CAUSAL_LOSS)):
            label = f"{_escape_math(name)}: {points[-1][1]:.4f}"
            upper.plot(*zip(*points, strict=True), label=label, marker="o", ms=4, **style)
        if gaps[name]:
            label = f"{_escape_math(name)}: {gaps[name][-1][1]:+.4f}"
            panels[1, 0].plot(*zip(*gaps[name], strict=True), label=label, marker=".", **style)
    figure.suptitle("held-out loss over training FLOPs")
    upper.set_ylabel("causal loss (nats a token)")
    upper.legend(fontsize="small", title="last value", title_fontsize="small")
    if has_gaps:
        panels[1, 0].axhline(0, color="0.6", lw=0.8)
        panels[1, 0].set_ylabel("causal - top-k")
        panels[1, 0].legend(fontsize="small")
    for axes in panels[:, 0]:
        axes.grid(alpha=0.3)
    panels[-1, 0].set_xlabel("training FLOPs, executed")
    with atomic_writer(path, path.parent) as file:
        figure.savefig(file, dpi=130, format="png")


def _escape_math(text: str) -> str:
    """Return ``text`` so that matplotlib shows it as it is, also a name with dollars."""
    return text.replace("$", r"\$")


def _points(
    records: list[dict[str, Any]], value_of: Callable[[dict[str, Any]], float | None]
) -> list[tuple[float, float]]:
    """Return FLOPs and value of the records that have one."""
    pairs = ((record["flops"], value_of(record)) for record in records)
    return [(flops, value) for flops, value in pairs if value is not None]


def _gap(record: dict[str, Any]) -> float | None:
    """Return how far the causal loss lies over the top-k loss, which is not causal."""
    causal, top_k = record.get(CAUSAL_LOSS), record.get(TOP_K_LOSS)
    return None if causal is None or top_k is None else causal - top_k


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.mean(numbers) if numbers and len(numbers) == len(values) else None


def _spread(values: list[float | None]) -> float | None:
    """Standard deviation over the seeds; None where there are fewer than two."""
    numbers = [value for value in values if value is not None]
    return statistics.stdev(numbers) if len(numbers) > 1 else None
