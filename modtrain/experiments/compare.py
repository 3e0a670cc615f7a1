"""Train several models on one budget and report them side by side, on the causal loss."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from modtrain.experiments.timing import step_seconds
from modtrain.files import write_text, written_aside
from modtrain.models.flops import dense_equivalent_flops, forward_flops
from modtrain.training.callbacks.held_out import CAUSAL_FLOPS, CAUSAL_LOSS, TOP_K_LOSS
from modtrain.training.config import TrainConfig
from modtrain.training.metrics_log import read_metrics
from modtrain.training.plan import resolve
from modtrain.training.run import train
from modtrain.training.run_directory import RunDirectory


def compare(directory: Path, arms: dict[str, TrainConfig], rounds: int) -> int:
    """Train each arm to its end, then print and draw the comparison.

    directory: where the report goes; the arms' runs name their own directories.

    Returns:
        The exit code: 0, or that of an arm which a signal stopped.

    Raises:
        ModtrainError: an arm cannot run; nothing is trained before all of them are checked.
    """
    console = Console()
    resolved = {name: resolve(config)[0] for name, config in arms.items()}
    report_path, picture = directory / "compare.json", directory / "loss_over_flops.png"
    if not all(RunDirectory.of(config).is_complete for config in resolved.values()):
        # What it says is about to be old; it comes back when everything is trained.
        report_path.unlink(missing_ok=True)
    for config in resolved.values():
        outcome = train(config)
        if outcome.exit_code:
            return outcome.exit_code
    if not _is_current(report_path, resolved):
        draw(resolved, picture)
        write_text(report_path, json.dumps(_report(resolved, rounds), indent=1))
    else:
        console.print(f"{directory} is complete: nothing was trained", soft_wrap=True)
    report = json.loads(report_path.read_text())
    show(report, console)
    console.print(f"\npicture: {picture.resolve()}", soft_wrap=True)
    console.print(
        f"TensorBoard: {_tensorboard()} --logdir {shlex.quote(str(directory))}", soft_wrap=True
    )
    return 0


def _is_current(report: Path, arms: dict[str, TrainConfig]) -> bool:
    """Whether the report is there and of these arms, the first one the same."""
    return report.is_file() and list(json.loads(report.read_text())) == list(arms)


def _tensorboard() -> str:
    """The command as it can be typed here: that of this environment, active or not."""
    beside = Path(sys.executable).with_name("tensorboard")
    if not beside.is_file():
        return "tensorboard"
    if beside.is_relative_to(Path.cwd()):
        beside = beside.relative_to(Path.cwd())
    return shlex.quote(str(beside))


def _report(arms: dict[str, TrainConfig], rounds: int) -> dict[str, Any]:
    times: dict[str, float] | dict[str, None]
    try:
        times = step_seconds(arms, rounds)
    except torch.OutOfMemoryError:
        # Each fits alone, all together do not: the losses are worth more than the times.
        times = dict.fromkeys(arms)
    return {name: _describe(config, times[name]) for name, config in arms.items()}


def _describe(config: TrainConfig, seconds: float | None) -> dict[str, Any]:
    result = json.loads(RunDirectory.of(config).result.read_text())
    seq_len = config.data.seq_len or 1
    forward = forward_flops(config.model, seq_len).total / seq_len
    return {
        "causal_loss": result.get(CAUSAL_LOSS),
        "top_k_loss_not_causal": result.get(TOP_K_LOSS),
        "forward_flops_per_token": forward,
        "causal_flops_per_token": result.get(CAUSAL_FLOPS) if config.model.is_routed else forward,
        "dense_equivalent_flops_per_token": dense_equivalent_flops(config.model, seq_len).total
        / seq_len,
        "micro_batch_seconds": seconds,
        **{key: result[key] for key in ("steps", "tokens", "flops")},
    }


def show(report: dict[str, dict[str, Any]], console: Console) -> None:
    """Print the report as a table, and in words who came out ahead."""
    flops = [arm["flops"] for arm in report.values()]
    equal = "equal" if max(flops) <= 1.02 * min(flops) else "UNEQUAL"
    table = Table(title=f"held-out loss at {equal} training FLOPs")
    for heading in ("", *report):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = {
        "causal loss (nats a token)": ("causal_loss", "{:.4f}"),
        "top-k loss, not causal": ("top_k_loss_not_causal", "{:.4f}"),
        "training FLOPs": ("flops", "{:.3e}"),
        "steps": ("steps", "{:,}"),
        "tokens": ("tokens", "{:,}"),
        "forward FLOPs a token, top-k": ("forward_flops_per_token", "{:,.0f}"),
        "forward FLOPs a token, causal": ("causal_flops_per_token", "{:,.0f}"),
        "step time of a micro-batch (ms)": ("micro_batch_seconds", "{:.1f}"),
    }
    for title, (key, form) in rows.items():
        values = [arm[key] for arm in report.values()]
        scale = 1000 if key == "micro_batch_seconds" else 1
        table.add_row(title, *("-" if v is None else form.format(v * scale) for v in values))
    console.print(table)
    for line in verdict(report):
        console.print(line, soft_wrap=True)


def verdict(report: dict[str, dict[str, Any]]) -> list[str]:
    """Say in words how each arm does against the first, for better or worse."""
    (first, base), *others = report.items()
    lines = []
    for name, arm in others:
        if arm["causal_loss"] is None or base["causal_loss"] is None:
            lines.append(f"{name} and {first} cannot be compared: one has no causal decision")
            continue
        change = arm["causal_loss"] / base["causal_loss"] - 1
        word = "beats" if change < 0 else "loses to" if change > 0 else "equals"
        flops = arm["forward_flops_per_token"] / base["forward_flops_per_token"]
        times = (arm["micro_batch_seconds"], base["micro_batch_seconds"])
        timed = "" if None in times else f" and {times[0] / times[1]:.3f} of its step time"
        lines.append(
            f"{name} {word} {first} at this size: causal loss {change:+.2%}, with"
            f" {flops:.3f} of its forward FLOPs{timed}"
        )
    return lines


def draw(arms: dict[str, TrainConfig], path: Path) -> None:
    """Draw held-out causal loss against training FLOPs, a curve an arm, as a PNG."""
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for number, (name, config) in enumerate(arms.items()):
        records = read_metrics(RunDirectory.of(config).metrics)
        points = [(r["flops"], r[CAUSAL_LOSS]) for r in records if CAUSAL_LOSS in r]
        color = f"C{number}"
        if points:
            label = f"{name}, causal"
            axes.plot(*zip(*points, strict=True), marker="o", color=color, label=label)
        above = [(r["flops"], r[TOP_K_LOSS]) for r in records if TOP_K_LOSS in r]
        if above:
            label = f"{name}, top-k (not causal)"
            axes.plot(*zip(*above, strict=True), ls=":", color=color, label=label)
    axes.set_xlabel("training FLOPs, executed")
    axes.set_ylabel("held-out loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with written_aside(path, path.parent) as file:
        figure.savefig(file, dpi=130, format="png")
