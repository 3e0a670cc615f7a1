"""Ends a run's jobs: after a checkpoint, and so that none of them comes back.

The jobs are named in ``CANCELLED`` first: a script that sees its own number there is not requeued.
Those that this user may not end are taken out again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from modtrain.cluster import slurm
from modtrain.cluster.config import CancelConfig
from modtrain.cluster.runs import (
    CANCELLED,
    RunNotFoundError,
    RunRecord,
    SubmittedJob,
    existing_run,
    newest_first,
    read_run,
)
from modtrain.cluster.slurm import DeniedError, SlurmError, SlurmJob
from modtrain.cluster.status import live_jobs
from modtrain.common.atomic_io import is_locked
from modtrain.common.errors import raise_if_any
from modtrain.common.overrides import spelled

# Between two looks; Slurm's own grace before it kills is 30 seconds by default.
_POLL_SECONDS, _KILL_GRACE = 1.0, 90.0

Print = Callable[[str], None]


def cancel_run(config: CancelConfig, print_line: Print) -> None:
    """End all jobs of the run that ``config`` names; without a live one, say so.

    Raises:
        ConfigError: what is asked for makes no sense.
        RunsError: there is no such run, or it is trained without Slurm.
        DeniedError: a job is another user's; it goes on as if nobody had asked.
        SlurmError: Slurm does not answer, or a job does not end.
    """
    raise_if_any(config.problems())
    path = existing_run(config.runs_dir, str(config.run))
    run = read_run(path, str(config.run))
    live = _live_jobs(run)
    if not live:
        if run.locked:
            raise RunNotFoundError(
                f"{path} is trained by a process without a job\n"
                "remedy: end that with Ctrl-C or TERM, where it was started; it saves first"
            )
        print_line(f"{path} has no job that waits or runs: nothing to cancel")
        return
    before = run.saved
    marks = _CancelledFile(path, run.cancelled)
    marks.add(run.submitted)
    _Cancellation(run, marks, config, print_line).end(live)
    run = read_run(path, run.name)
    if run.is_group:
        runs_dir = "" if config.runs_dir == "runs" else f" {spelled('runs_dir', config.runs_dir)}"
        status_command = f"modtrain status {spelled('run', run.name)}{runs_dir}"
        print_line(f"cancelled; {path} can go on: see by {status_command} how far its runs are")
    elif run.complete:
        print_line(f"{path} has come to its end meanwhile: it is complete")
    elif run.saved is None:
        print_line(f"cancelled; {path} has no checkpoint")
    else:
        new = "saved now" if run.saved != before else "saved before"
        print_line(f"cancelled; {path} can go on from step {run.saved[0]}, {new}")


def _live_jobs(run: RunRecord) -> list[SlurmJob]:
    """Ask for the jobs that are not over, running ones first."""
    return live_jobs(run.submitted, slurm.jobs(newest_first(run.submitted)))


class _CancelledFile:
    """The jobs that this call names in ``CANCELLED``. before: those that stood there already."""

    def __init__(self, folder: Path, before: Collection[str]) -> None:
        self.path = folder / CANCELLED
        self._before, self._new = frozenset(before), set[str]()

    def add(self, jobs: Iterable[SubmittedJob]) -> None:
        new = dict.fromkeys(job.id for job in jobs if job.id not in self._before | self._new)
        with self.path.open("a") as file:
            file.write("".join(f"{name}\n" for name in new))
        self._new.update(new)

    def remove_except(self, cancelled: Collection[str]) -> None:
        """Leave of this call's marks those alone that stand for a job that it did ``end``."""
        remaining_marks = {
            mark for mark in self._new if any(map(SubmittedJob(mark).covers, cancelled))
        }
        removed = self._new - remaining_marks
        remaining = [name for name in self.path.read_text().split() if name not in removed]
        if remaining:
            # In place: a new file would be closed to the others who may write this one.
            self.path.write_text("".join(f"{name}\n" for name in remaining))
        else:
            self.path.unlink()


@dataclass
class _Cancellation:
    """What was done to a run's jobs. asked: those told to save. ended: those that scancel ended.

    named: those of the last command.
    """

    run: RunRecord
    marks: _CancelledFile
    config: CancelConfig
    print_line: Print
    signalled: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)
    last_ids: list[str] = field(default_factory=list)

    def end(self, live: list[SlurmJob]) -> None:
        """End the jobs: those that wait first, or one of them would begin as another ends.

        Looks again until none is left: a job may begin, or be requeued, between two looks.
        """
        save_until = time.monotonic() + (self.config.wait if self.config.save else 0)
        deadline = save_until + _KILL_GRACE
        error_text = ""
        while live:
            try:
                self._act(live, time.monotonic() >= save_until)
            except DeniedError as error:
                # The next look would find the same, and the mark would stop the owner's job.
                self._unmark_denied(error)
                raise
            except SlurmError as error:
                # It may have ended, or begun, by itself; the next look tells.
                error_text = str(error)
            if time.monotonic() > deadline:
                names = ", ".join(job.id for job in live)
                raise SlurmError(
                    f"job {names} does not end. {error_text}\nremedy: see by `scontrol show job`"
                    " what it does; it will not be requeued"
                )
            time.sleep(_POLL_SECONDS)
            live = self._refresh()
        # The lock goes with the process, which Slurm's answer may be ahead of.
        while is_locked(self.run.path / ".lock") and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def _act(self, live: list[SlurmJob], is_overdue: bool) -> None:
        waiting = [job.id for job in live if job.is_pending]
        active = [job.id for job in live if not job.is_pending]
        unsaved = [name for name in active if name not in self.signalled]
        self.last_ids = waiting or (active if is_overdue else unsaved)
        if waiting:
            slurm.cancel(waiting)
            self.cancelled.update(waiting)
        elif is_overdue:
            slurm.cancel(active)
            if new := sorted(set(active) - self.cancelled):
                after = f" after {self.config.wait:g} s" if self.config.save else ""
                self.print_line(f"job {', '.join(new)}: ended{after}")
            self.cancelled.update(active)
        elif unsaved:
            slurm.signal_save(unsaved)
            self.signalled.update(unsaved)
            text = f"job {', '.join(unsaved)}: asked to save and to end"
            self.print_line(f"{text}; {self.config.wait:g} s for it")

    def _refresh(self) -> list[SlurmJob]:
        """Ask again; a script that was on its way to submit itself has another number now."""
        self.run = read_run(self.run.path, self.run.name)
        self.marks.add(self.run.submitted)
        return _live_jobs(self.run)

    def _unmark_denied(self, error: DeniedError) -> None:
        """Unmark the jobs that go on: all but those that were reached, by this command or before.

        What is denied for one job is done to the others of the command.
        """
        denied = {name for name in self.last_ids if error.names(name)} or set(self.last_ids)
        self.marks.remove_except((self.signalled | self.cancelled | set(self.last_ids)) - denied)
