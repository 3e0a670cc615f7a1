"""A sweep or a search as a table of the states of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from modtrain.common.errors import CheckpointError, ModtrainError
from modtrain.experiments.sweep.job_process import failure_text, state_of
from modtrain.experiments.sweep.jobs import read_jobs
from modtrain.training.metric_names import CAUSAL_LOSS
from modtrain.training.metrics_log import read_metrics
from modtrain.training.plan import forward_flops_per_token, resolve
from modtrain.training.run_directory import RunDirectory

_FIGURES = ("step", "loss", "held-out causal loss", "training FLOPs", "forward FLOPs a token")
_NONE = "-"


def sweep_table(directory: Path) -> Table:
    """Return a table with a row for each job: swept overrides, state, progress, and failure.

    Losses are the last ones, in nats a token; training FLOPs are those executed so far.

    Raises:
        CheckpointError: ``directory`` has no sweep.
    """
    jobs = read_jobs(directory)
    if not jobs:
        raise CheckpointError(f"{directory} has no sweep: sweep.json is missing")
    keys = sorted({key for swept in jobs.values() for key in swept})
    table = Table(title=str(directory))
    for key in keys:
        table.add_column(key, overflow="fold")
    table.add_column("state")
    for figure in _FIGURES:
        table.add_column(figure, justify="right")
    table.add_column("why", overflow="fold")
    for name, swept in jobs.items():
        run = RunDirectory(directory / name)
        row = [*(swept.get(key, _NONE) for key in keys), *_figures(run), failure_text(run)]
        table.add_row(*map(escape, row))
    return table


def _figures(run: RunDirectory) -> list[str]:
    steps, forward = _NONE, _NONE
    last: dict[str, Any] = {"step": 0}
    for record in read_metrics(run.metrics):
        last.update(record)
    try:
        config = run.read_config()
        forward = f"{forward_flops_per_token(config):,.0f}"
        steps = f"{resolve(config, needs_data=False)[1].steps:,}"
    except ModtrainError:
        # Not started, or its data is not here any more.
        pass
    return [
        state_of(run),
        f"{last['step']:,}/{steps}" if run.config.is_file() else _NONE,
        _format(last.get("loss"), "{:.4f}"),
        _format(last.get(CAUSAL_LOSS), "{:.4f}"),
        _format(last.get("flops"), "{:.3e}"),
        forward,
    ]


def _format(value: float | None, form: str) -> str:
    return _NONE if value is None else form.format(value)
