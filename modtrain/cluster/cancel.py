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
from modtrain.cluster.cancel_config import CancelConfig
from modtrain.cluster.runs import (
    CANCELLED,
    Run,
    RunsError,
    Submitted,
    existing_run,
    newest_first,
    read_run,
)
from modtrain.cluster.slurm import DeniedError, Job, SlurmError
from modtrain.cluster.status import live_jobs
from modtrain.common.atomic_io import is_locked
from modtrain.common.errors import raise_if_any
from modtrain.common.overrides import spelled

# Between two looks; Slurm's own grace before it kills is 30 seconds by default.
_LOOK, _KILL_GRACE = 1.0, 90.0

Say = Callable[[str], None]


def cancel_run(config: CancelConfig, say: Say) -> None:
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
    live = _live(run)
    if not live:
        if run.locked:
            raise RunsError(
                f"{path} is trained by a process without a job\n"
                "remedy: end that with Ctrl-C or TERM, where it was started; it saves first"
            )
        say(f"{path} has no job that waits or runs: nothing to cancel")
        return
    before = run.saved
    marks = _Marks(path, run.cancelled)
    marks.add(run.submitted)
    _Ending(run, marks, config, say).end(live)
    run = read_run(path, run.name)
    if run.is_group:
        where = "" if config.runs_dir == "runs" else f" {spelled('runs_dir', config.runs_dir)}"
        told = f"modtrain status {spelled('run', run.name)}{where}"
        say(f"cancelled; {path} can go on: see by {told} how far its runs are")
    elif run.complete:
        say(f"{path} has come to its end meanwhile: it is complete")
    elif run.saved is None:
        say(f"cancelled; {path} has no checkpoint")
    else:
        new = "saved now" if run.saved != before else "saved before"
        say(f"cancelled; {path} can go on from step {run.saved[0]}, {new}")


def _live(run: Run) -> list[Job]:
    """Ask for the jobs that are not over, running ones first."""
    return live_jobs(run.submitted, slurm.jobs(newest_first(run.submitted)))


class _Marks:
    """The jobs that this call names in ``CANCELLED``. before: those that stood there already."""

    def __init__(self, folder: Path, before: Collection[str]) -> None:
        self.path = folder / CANCELLED
        self._before, self._new = frozenset(before), set[str]()

    def add(self, jobs: Iterable[Submitted]) -> None:
        new = dict.fromkeys(job.id for job in jobs if job.id not in self._before | self._new)
        with self.path.open("a") as file:
            file.write("".join(f"{name}\n" for name in new))
        self._new.update(new)

    def take_back(self, ended: Collection[str]) -> None:
        """Leave of this call's marks those alone that stand for a job that it did ``end``."""
        kept = {mark for mark in self._new if any(map(Submitted(mark).covers, ended))}
        gone = self._new - kept
        left = [name for name in self.path.read_text().split() if name not in gone]
        if left:
            # In place: a new file would be closed to the others who may write this one.
            self.path.write_text("".join(f"{name}\n" for name in left))
        else:
            self.path.unlink()


@dataclass
class _Ending:
    """What was done to a run's jobs. asked: those told to save. ended: those that scancel ended.

    named: those of the last command.
    """

    run: Run
    marks: _Marks
    config: CancelConfig
    say: Say
    asked: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    named: list[str] = field(default_factory=list)

    def end(self, live: list[Job]) -> None:
        """End the jobs: those that wait first, or one of them would begin as another ends.

        Looks again until none is left: a job may begin, or be requeued, between two looks.
        """
        save_until = time.monotonic() + (self.config.wait if self.config.save else 0)
        deadline = save_until + _KILL_GRACE
        trouble = ""
        while live:
            try:
                self._act(live, time.monotonic() >= save_until)
            except DeniedError as error:
                # The next look would find the same, and the mark would stop the owner's job.
                self._take_back(error)
                raise
            except SlurmError as error:
                # It may have ended, or begun, by itself; the next look tells.
                trouble = str(error)
            if time.monotonic() > deadline:
                names = ", ".join(job.id for job in live)
                raise SlurmError(
                    f"job {names} does not end. {trouble}\nremedy: see by `scontrol show job`"
                    " what it does; it will not be requeued"
                )
            time.sleep(_LOOK)
            live = self._look()
        # The lock goes with the process, which Slurm's answer may be ahead of.
        while is_locked(self.run.path / ".lock") and time.monotonic() < deadline:
            time.sleep(_LOOK)

    def _act(self, live: list[Job], had_time: bool) -> None:
        waiting = [job.id for job in live if job.waits]
        active = [job.id for job in live if not job.waits]
        unsaved = [name for name in active if name not in self.asked]
        self.named = waiting or (active if had_time else unsaved)
        if waiting:
            slurm.cancel(waiting)
            self.ended.update(waiting)
        elif had_time:
            slurm.cancel(active)
            if new := sorted(set(active) - self.ended):
                after = f" after {self.config.wait:g} s" if self.config.save else ""
                self.say(f"job {', '.join(new)}: ended{after}")
            self.ended.update(active)
        elif unsaved:
            slurm.ask_to_save(unsaved)
            self.asked.update(unsaved)
            told = f"job {', '.join(unsaved)}: asked to save and to end"
            self.say(f"{told}; {self.config.wait:g} s for it")

    def _look(self) -> list[Job]:
        """Ask again; a script that was on its way to submit itself has another number now."""
        self.run = read_run(self.run.path, self.run.name)
        self.marks.add(self.run.submitted)
        return _live(self.run)

    def _take_back(self, error: DeniedError) -> None:
        """Unmark the jobs that go on: all but those that were reached, by this command or before.

        What is denied for one job is done to the others of the command.
        """
        denied = {name for name in self.named if error.names(name)} or set(self.named)
        self.marks.take_back((self.asked | self.ended | set(self.named)) - denied)
