"""A sweep or a search as a table of the states of its runs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from modtrain.cluster.runs import RunRecord, read_run
from modtrain.cluster.status import SlurmReply, ask_slurm
from modtrain.cluster.status import state_of as job_state_of
from modtrain.common.errors import CheckpointError, ModtrainError
from modtrain.common.reading import UnreadableError
from modtrain.common.terminal import WIDE, Column, fitted_table
from modtrain.experiments.sweep.job_process import failure_text, state_of
from modtrain.experiments.sweep.jobs import read_jobs
from modtrain.training.metric_names import CAUSAL_LOSS
from modtrain.training.metrics_log import read_metrics
from modtrain.training.plan import forward_flops_per_token
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
    records = {name: read_run(directory / name, name) for name in jobs}
    slurm_reply = ask_slurm(list(records.values()))
    keys = sorted({key for swept in jobs.values() for key in swept})
    rows = []
    for name, swept in jobs.items():
        run = RunDirectory(directory / name)
        state, why = _state(run, records[name], slurm_reply)
        values = (swept.get(key, _NONE) for key in keys)
        cells = (*values, state, *_figures(run, records[name]), why)
        rows.append([*map(Text, cells)])
    columns = [*(Column(key, least=12) for key in keys), *_FIGURES, Column("why", 2, least=14)]
    title = str(directory)
    if slurm_reply.error:
        title = f"{title}\n{slurm_reply.error}"
    return fitted_table(columns, rows, width, title)


def _state(run: RunDirectory, record: RunRecord, slurm_reply: SlurmReply) -> tuple[str, str]:
    """Return the state and its reason. A job may wait, or work on a node whose locks are unseen."""
    state, of_job = state_of(run), job_state_of(record, slurm_reply.jobs)
    if state in ("stopped", "not started") and of_job.name in ("running", "pending", "failed"):
        return of_job.name, of_job.reason
    return state, failure_text(run)


def _figures(run: RunDirectory, record: RunRecord) -> list[str]:
    """Return the figures of a run. Its last step may be saved and not recorded."""
    forward = _NONE
    steps = _NONE if record.steps is None else f"{record.steps:,}"
    last: dict[str, Any] = {"step": 0}
    # A damaged one hides no other run.
    with suppress(UnreadableError):
        for line in read_metrics(run.metrics):
            last.update(line)
    try:
        config = run.read_config()
        forward = f"{forward_flops_per_token(config):,.0f}"
    except ModtrainError:
        # Not started.
        pass
    return [
        f"{max(last['step'], record.step or 0):,}/{steps}" if run.config.is_file() else _NONE,
        _format(last.get("loss"), "{:.4f}"),
        _format(last.get(CAUSAL_LOSS), "{:.4f}"),
        _format(last.get("flops"), "{:.3e}"),
        forward,
    ]


def _format(value: float | None, form: str) -> str:
    return _NONE if value is None else form.format(value)
