"""`modtrain status`: the state and progress of runs, and their Slurm jobs.

Both the run's files and Slurm are read: a lock may not be visible from another node, and Slurm does
not know runs that were started by hand and soon forgets finished jobs.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from modtrain.cluster import slurm
from modtrain.cluster.config import StatusConfig
from modtrain.cluster.cost import show_costs
from modtrain.cluster.runs import (
    Failure,
    RunNotFoundError,
    RunRecord,
    SubmittedJob,
    existing_run,
    read_run,
)
from modtrain.cluster.slurm import SlurmError, SlurmJob
from modtrain.common.errors import raise_if_any
from modtrain.common.spelling import spelled
from modtrain.common.terminal import WIDE, Column, fitted_table, plain_console
from modtrain.training.run_listing import find_runs, has_runs_below

STATES = ("running", "pending", "failed", "stopped", "never started", "complete", "over")
_STYLES = {"running": "green", "pending": "yellow", "failed": "red", "complete": "dim"}
_MAX_FAILURES = 5
# The newest jobs of a long chain; the others have ended.
_MAX_JOBS = 50


@dataclass(frozen=True)
class RunState:
    """The state of a run. name: one of `STATES`. reason: of this state, on one line.

    ``over`` is a group whose jobs have ended: its runs show the outcome.
    """

    name: str
    reason: str = ""


@dataclass
class SlurmReply:
    """What Slurm knows of the jobs. error: why there was no query or no answer; else empty."""

    jobs: dict[str, SlurmJob] = field(default_factory=dict)
    error: str = ""


def show_status(config: StatusConfig, console: Console | None = None) -> None:
    """Print the table of runs, or one run in detail with those below it; or what they took.

    Raises:
        ConfigError: the request is invalid.
        RunNotFoundError: there is no such run.
    """
    raise_if_any(config.problems())
    console = console or wide_console()
    root = Path(config.runs_dir)
    if config.runs_dir != StatusConfig.runs_dir and not root.is_dir():
        raise RunNotFoundError(
            f"runs_dir={root} is no directory\nremedy: give the one that runs were trained in"
        )
    top = root if config.run is None else existing_run(config.runs_dir, config.run)
    if top.is_dir() and not os.access(top, os.R_OK | os.X_OK, effective_ids=True):
        raise RunNotFoundError(
            f"{top} cannot be read: it may have runs\n"
            "remedy: let the user of this process read and search the directory"
        )
    runs = [read_run(path, str(path.relative_to(root))) for path in find_runs(top)]
    if config.cost:
        show_costs(runs, console)
        return
    # Of a single run all jobs are shown, of many only those of unfinished ones.
    slurm_reply = ask_slurm(runs, None if config.run is None else top)
    states = [state_of(run, slurm_reply.jobs) for run in runs]
    if config.run is not None and runs and runs[0].path == top:
        _print_detail(runs[0], states[0], slurm_reply, config, console)
        runs, states = runs[1:], states[1:]
    elif not runs:
        console.print(Text(f"there are no runs in {top}"))
    _print_table(list(zip(runs, states, strict=True)), slurm_reply, console)
    for run in runs:
        for note in run.notes:
            console.print(Text(note))
    if slurm_reply.error:
        console.print(Text(slurm_reply.error))


def _print_table(
    rows: Sequence[tuple[RunRecord, RunState]], slurm_reply: SlurmReply, console: Console
) -> None:
    """Print the table, and the number of runs in each state."""
    shown = [(run, state) for run, state in rows if state.name != "over"]
    if shown:
        console.print(_table(shown, slurm_reply, console.width))
    counts = Counter(state.name for run, state in rows if not run.is_group)
    if number := counts.total():
        counts_text = ", ".join(f"{counts[name]} {name}" for name in STATES if counts[name])
        console.print(Text(f"{number} run{'s' * (number > 1)}: {counts_text}"))


def wide_console() -> Console:
    """Return a console that does not wrap output to a file or another program."""
    return plain_console() if sys.stdout.isatty() else plain_console(width=WIDE)


def ask_slurm(runs: Sequence[RunRecord], shown: Path | None = None) -> SlurmReply:
    """Query Slurm once for the jobs of all unfinished runs. Raises nothing.

    shown: directory of a run whose jobs are wanted even if it is complete.
    """
    asked = [run for run in runs if not run.complete or run.path == shown]
    ids = {job.id for run in asked for job in run.evaluations[-_MAX_JOBS:]}
    ids |= {name for run in asked for name in run.job_ids[:_MAX_JOBS]}
    if ids and not slurm.has_slurm():
        return SlurmReply(
            error="Slurm is not available here: pending and remote jobs are not shown"
        )
    try:
        return SlurmReply(slurm.jobs(ids))
    except SlurmError as error:
        return SlurmReply(error=f"the state of jobs is unknown: {error}")


def live_jobs(submitted: Sequence[SubmittedJob], jobs: Mapping[str, SlurmJob]) -> list[SlurmJob]:
    """Return the run's unfinished jobs, running ones first, then oldest first."""
    live = {
        job.id: job
        for submission in submitted
        for job in jobs.values()
        if submission.covers(job.id) and submission.is_same(job) and not job.is_finished
    }
    return sorted(live.values(), key=lambda job: (job.is_pending, job.number))


def state_of(run: RunRecord, jobs: Mapping[str, SlurmJob]) -> RunState:
    """Return the state of ``run``. jobs: those that Slurm knows, by id."""
    live = live_jobs(run.submitted, jobs)
    active = [job for job in live if not job.is_pending]
    if run.complete:
        return RunState("complete")
    if run.locked or active:
        suspended = bool(active) and active[0].state in ("SUSPENDED", "STOPPED")
        slow = ", ".join(dict.fromkeys(slow.node for slow in run.slow))
        reason = active[0].state.lower() if suspended else f"slow: {slow}" if slow else ""
        return RunState("running", reason)
    failure = _unresolved_failure(run)
    if live:
        reason = live[0].reason or live[0].state.lower()
        earlier = f"; failed before: {failure.cause}" if failure else ""
        return RunState("pending", reason + earlier)
    if failure:
        return RunState("failed", failure.cause)
    return _inactive_group_state(run, jobs) if run.is_group else _inactive_state(run, jobs)


def _inactive_state(run: RunRecord, jobs: Mapping[str, SlurmJob]) -> RunState:
    """Return the state of a run without a process and without a recorded failure."""
    ended = _slurm_end_state(run, jobs)
    if run.starts or run.step:
        return ended or RunState("stopped", "cancelled" if _was_cancelled(run) else "")
    if ended and ended.name == "failed":
        return ended
    return RunState("never started", ended.reason if ended else "")


def _inactive_group_state(run: RunRecord, jobs: Mapping[str, SlurmJob]) -> RunState:
    """Return the state of a group without a job. An array's tasks are shown by their runs."""
    group_jobs = {name: job for name, job in jobs.items() if "_" not in job.id}
    ended = _slurm_end_state(run, group_jobs)
    is_failed = ended is not None and ended.name == "failed" and not _was_cancelled(run)
    return ended if ended is not None and is_failed else RunState("over")


def _was_cancelled(run: RunRecord) -> bool:
    return bool(run.submitted) and run.submitted[-1].id in run.cancelled


def _unresolved_failure(run: RunRecord) -> Failure | None:
    """Return the last failure, unless the run was restarted since."""
    if not run.failures:
        return None
    last = run.failures[-1]
    began = run.starts[-1] if run.starts else run.last_active
    # Both have a resolution of one second.
    return last if last.time >= int(began) else None


def _slurm_end_state(run: RunRecord, jobs: Mapping[str, SlurmJob]) -> RunState | None:
    """Return the state in which the newest job ended, as long as Slurm remembers it."""
    for submission in reversed(run.submitted):
        job = jobs.get(submission.id)
        if job is not None and submission.is_same(job):
            reason = f"job {job.id}: {_describe_job(job)}"
            stopped = job.state in ("CANCELLED", "COMPLETED", "PREEMPTED", "TIMEOUT", "DEADLINE")
            # Exit codes such as 75 are failures to Slurm, but not of the run.
            began = bool(run.starts) or (run.is_group and has_runs_below(run.path))
            stopped = stopped or (job.state == "FAILED" and began)
            return RunState("stopped" if stopped else "failed", reason)
    return None


def _describe_job(job: SlurmJob) -> str:
    state = job.state.lower().replace("_", " ")
    return f"{state} ({job.reason})" if job.reason else state


# What is left out first of a narrow terminal has the highest rank.
_COLUMNS = (
    Column("run", least=16),
    Column("state"),
    Column("step", 1, justify="right"),
    Column("done", 3, justify="right"),
    Column("loss", 5, justify="right"),
    Column("held out", 4, justify="right"),
    Column("restarts", 8, justify="right"),
    Column("saved", 7, justify="right"),
    Column("job", 6, least=8),
    Column("why", 2, least=14),
)


def _table(
    shown: Sequence[tuple[RunRecord, RunState]], slurm_reply: SlurmReply, width: int
) -> Table:
    rows = [
        (
            Text(run.name),
            Text(state.name, _STYLES.get(state.name, "")),
            _steps_text(run),
            _percent_done(run),
            _format_loss(run.loss),
            _format_loss(run.held_out),
            str(len(run.starts) - 1) if run.starts else "",
            _checkpoint_text(run),
            Text(_job_text(run, slurm_reply)),
            Text(_shorten(state.reason)),
        )
        for run, state in shown
    ]
    return fitted_table(_COLUMNS, rows, width)


def _job_text(run: RunRecord, slurm_reply: SlurmReply) -> str:
    live = live_jobs(run.submitted, slurm_reply.jobs)
    if live:
        more = f" +{len(live) - 1}" if len(live) > 1 else ""
        return live[0].id + more
    return run.submitted[-1].id if run.submitted and not run.complete else ""


def _print_detail(
    run: RunRecord, state: RunState, slurm_reply: SlurmReply, config: StatusConfig, console: Console
) -> None:
    table = Table(show_header=False, title=Text(str(run.path)), title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    lines = {
        "state": state.name + (f": {state.reason}" if state.reason else ""),
        "began with": run.parent,
        "step": " ".join(part for part in (_steps_text(run), _percent_done(run)) if part),
        "loss": _format_loss(run.loss),
        "held-out loss": _format_loss(run.held_out),
        "last record": _format_age(run.changed),
        "checkpoint": _checkpoint_text(run, "step "),
        "starts": str(len(run.starts)) if run.starts else "",
    }
    for name, value in lines.items():
        if value:
            table.add_row(name, Text(value))
    for name in reversed(run.job_ids[:_MAX_JOBS]):
        table.add_row("job", Text(_job_line(name, run, slurm_reply)))
    for evaluation in run.evaluations[-_MAX_JOBS:]:
        table.add_row("evaluation", Text(_job_line(evaluation.id, run, slurm_reply)))
    for slow in run.slow[:_MAX_FAILURES]:
        table.add_row("slow", Text(f"{slow}, since step {slow.since}"))
    for failure in run.failures[-_MAX_FAILURES:]:
        table.add_row("failed", Text(_failure_line(failure)))
    console.print(table)
    for note in run.notes:
        console.print(Text(note))
    runs_dir = "" if config.runs_dir == "runs" else f" {spelled('runs_dir', config.runs_dir)}"
    run_overrides = f"{spelled('run', run.name)}{runs_dir}"
    follow = f"modtrain logs {run_overrides} follow=true"
    console.print(
        Text(f"to follow: {follow}\nto cancel: modtrain cancel {run_overrides}"), soft_wrap=True
    )


def _job_line(name: str, run: RunRecord, slurm_reply: SlurmReply) -> str:
    job = slurm_reply.jobs.get(name)
    submission = next(submission for submission in run.all_jobs if submission.id == name)
    if job is None or not submission.is_same(job):
        return name if slurm_reply.error else f"{name}: over"
    parts = [
        _describe_job(job),
        f"on {job.nodes}" if job.nodes and not job.is_pending else "",
        f"for {job.time_left} yet" if not job.is_pending and not job.is_finished else "",
        f"expected to start at {job.start}" if job.is_pending and job.start else "",
        f"requeued {job.restarts} times" if job.restarts else "",
    ]
    return f"{name}: " + ", ".join(part for part in parts if part)


def _failure_line(failure: Failure) -> str:
    at = f" at step {failure.step}" if failure.step else ""
    job = f", job {failure.job}" if failure.job else ""
    nodes = failure.node.replace(",", ", ")
    node = f", bad node{'s' * (',' in nodes)} {nodes}" if nodes else ""
    return f"{_format_age(failure.time)}{at}{job}{node}: {failure.cause}"


def _steps_text(run: RunRecord) -> str:
    if run.step is None and run.steps is None:
        return ""
    return f"{run.step or 0}/{'?' if run.steps is None else run.steps}"


def _percent_done(run: RunRecord) -> str:
    if not run.steps:
        return ""
    share = min(1.0, (run.step or 0) / run.steps)
    # Rounded down: 99.97 % is not 100 %.
    return f"{math.floor(1000 * share) / 10:g}%"


def _checkpoint_text(run: RunRecord, before: str = "") -> str:
    return "" if run.saved is None else f"{before}{run.saved[0]}, {_format_age(run.saved[1])}"


def _format_loss(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _shorten(text: str, most: int = 120) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _format_age(moment: float | None) -> str:
    """Format how long ago it was, in one unit."""
    if moment is None:
        return ""
    seconds = max(0.0, time.time() - moment)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
