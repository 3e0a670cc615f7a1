"""Ends a run's jobs: after a checkpoint, and so that none of them comes back.

The jobs are named in ``CANCELLED`` first: a script that sees its own number there is not requeued.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from modtrain.cluster import slurm
from modtrain.cluster.cancel_config import CancelConfig
from modtrain.cluster.runs import (
    CANCELLED,
    Run,
    RunsError,
    existing_run,
    newest_first,
    read_run,
)
from modtrain.cluster.slurm import Job, SlurmError
from modtrain.cluster.status import live_jobs
from modtrain.errors import raise_if_any
from modtrain.files import is_locked

# Between two looks; Slurm's own grace before it kills is 30 seconds by default.
_LOOK, _KILL_GRACE = 1.0, 90.0

Say = Callable[[str], None]


def cancel_run(config: CancelConfig, say: Say) -> None:
    """End all jobs of the run that ``config`` names; without a live one, say so.

    Raises:
        ConfigError: what is asked for makes no sense.
        RunsError: there is no such run, or it is trained without Slurm.
        SlurmError: Slurm does not answer, or a job does not end.
    """
    raise_if_any(config.problems())
    path = existing_run(config.runs_dir, str(config.run))
    run = read_run(path, str(config.run))
    live = _live(run)
    if not live:
        if run.locked:
            raise RunsError(
                f"{path} is trained by a process without a job\n"
                "remedy: end that with Ctrl-C or TERM, where it was started; it saves first"
            )
        say(f"{path} has no job that waits or runs: nothing to cancel")
        return
    _mark(path, [known.id for known in run.submitted])
    before = run.saved
    _end(run, live, config, say)
    run = read_run(path, run.name)
    if run.complete:
        say(f"{path} has come to its end meanwhile: it is complete")
    elif run.saved is None:
        say(f"cancelled; {path} has no checkpoint")
    else:
        new = "saved now" if run.saved != before else "saved before"
        say(f"cancelled; {path} can go on from step {run.saved[0]}, {new}")


def _live(run: Run) -> list[Job]:
    """Ask for the jobs that are not over, running ones first."""
    return live_jobs(run.submitted, slurm.jobs(newest_first(run.submitted)))


def _mark(path: Path, ids: Sequence[str]) -> None:
    with (path / CANCELLED).open("a") as file:
        file.write("".join(f"{name}\n" for name in ids))


def _end(run: Run, live: list[Job], config: CancelConfig, say: Say) -> None:
    """End the jobs: those that wait first, or one of them would begin as another ends.

    Looks again until none is left: a job may begin, or be requeued, between two looks.
    """
    save_until = time.monotonic() + (config.wait if config.save else 0)
    deadline = save_until + _KILL_GRACE
    asked: set[str] = set()
    killed: set[str] = set()
    trouble = ""
    while live:
        waiting = [job.id for job in live if job.waits]
        active = [job.id for job in live if not job.waits]
        unsaved = [name for name in active if name not in asked]
        try:
            if waiting:
                slurm.cancel(waiting)
            elif time.monotonic() >= save_until:
                if new := set(active) - killed:
                    _say_killed(config, sorted(new), say)
                    killed |= new
                slurm.cancel(active)
            elif unsaved:
                slurm.ask_to_save(unsaved)
                asked.update(unsaved)
                say(f"job {', '.join(unsaved)}: asked to save and to end; {config.wait:g} s for it")
        except SlurmError as error:
            # It may have ended, or begun, by itself; the next look tells.
            trouble = str(error)
        if time.monotonic() > deadline:
            names = ", ".join(job.id for job in live)
            raise SlurmError(
                f"job {names} does not end. {trouble}\nremedy: see by `scontrol show job`"
                " what it does; it will not be requeued"
            )
        time.sleep(_LOOK if waiting or active else 0)
        # A script that was on its way to submit itself again has another number now.
        again = read_run(run.path, run.name)
        new_ids = [known.id for known in again.submitted if known not in run.submitted]
        _mark(run.path, new_ids)
        run = again
        live = _live(run)
    # The lock goes with the process, which Slurm's answer may be ahead of.
    while is_locked(run.path / ".lock") and time.monotonic() < deadline:
        time.sleep(_LOOK)


def _say_killed(config: CancelConfig, names: Sequence[str], say: Say) -> None:
    after = f" after {config.wait:g} s" if config.save else ""
    say(f"job {', '.join(names)}: ended{after}")
