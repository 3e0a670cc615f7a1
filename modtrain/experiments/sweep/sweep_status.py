"""A sweep or a search as a table of the states of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from modtrain.common.errors import CheckpointError, ModtrainError
from modtrain.common.terminal import WIDE, Column, fitted_table
from modtrain.experiments.sweep.job_process import failure_text, state_of
from modtrain.experiments.sweep.jobs import read_jobs
from modtrain.training.metric_names import CAUSAL_LOSS
from modtrain.training.metrics_log import read_metrics
from modtrain.training.plan import forward_flops_per_token, resolve
from modtrain.training.run_directory import RunDirectory

_FIGURES = (
    Column("state"),
    Column("step", 3, justify="right"),
    Column("loss", 5, justify="right"),
    Column("held-out causal loss", 1, 9, justify="right"),
    Column("training FLOPs", 6, 9, justify="right"),
    Column("forward FLOPs a token", 4, 11, justify="right"),
)
_NONE = "-"


def sweep_table(directory: Path, width: int = WIDE) -> Table:
    """Return a table with a row for each job: swept overrides, state, progress, and failure.

    Losses are the last ones, in nats a token; training FLOPs are those executed so far. width: of
    the terminal, in characters.

    Raises:
        CheckpointError: ``directory`` has no sweep.
    """
    jobs = read_jobs(directory)
    if not jobs:
        raise CheckpointError(f"{directory} has no sweep: sweep.json is missing")
    keys = sorted({key for swept in jobs.values() for key in swept})
    rows = []
    for name, swept in jobs.items():
        run = RunDirectory(directory / name)
        values = (swept.get(key, _NONE) for key in keys)
        rows.append([*map(Text, (*values, *_figures(run), failure_text(run)))])
    columns = [*(Column(key, least=12) for key in keys), *_FIGURES, Column("why", 2, least=14)]
    return fitted_table(columns, rows, width, str(directory))


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
