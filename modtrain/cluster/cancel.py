"""`modtrain cancel`: ends a run's jobs after a checkpoint, so that they are not requeued.

The jobs are listed in ``CANCELLED`` first: a script that finds its own id there does not requeue.
Jobs that this user may not cancel are removed from the list again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from modtrain.cluster import slurm
from modtrain.cluster.config import CancelConfig
from modtrain.cluster.runs import (
    CANCELLED,
    RunNotFoundError,
    RunRecord,
    SubmittedJob,
    existing_run,
    read_run,
)
from modtrain.cluster.slurm import DeniedError, SlurmError, SlurmJob
from modtrain.cluster.status import live_jobs
from modtrain.common.atomic_io import is_locked, open_to_append
from modtrain.common.errors import raise_if_any
from modtrain.common.spelling import spelled

# Slurm's own KillWait is 30 seconds by default.
_POLL_SECONDS, _KILL_GRACE = 1.0, 90.0

Print = Callable[[str], None]


def cancel_run(config: CancelConfig, print_line: Print = print) -> None:
    """Cancel all jobs of the run that ``config`` names.

    Raises:
        ConfigError: the request is invalid.
        RunNotFoundError: there is no such run, or it is trained without Slurm.
        DeniedError: a job is another user's; it continues unchanged.
        SlurmError: Slurm does not answer, or a job does not end.
    """
    raise_if_any(config.problems())
    path = existing_run(config.runs_dir, str(config.run))
    run = read_run(path, str(config.run))
    live = _live_jobs(run)
    if not live:
        if run.locked:
            raise RunNotFoundError(
                f"{path} is trained by a process outside Slurm\n"
                "remedy: stop it with Ctrl-C or SIGTERM where it was started; it saves first"
            )
        print_line(f"{path} has no pending or running job: nothing to cancel")
        return
    before = run.saved
    _Cancellation(run, config, print_line).end(live)
    run = read_run(path, run.name)
    if run.is_group:
        runs_dir = "" if config.runs_dir == "runs" else f" {spelled('runs_dir', config.runs_dir)}"
        status_command = f"modtrain status {spelled('run', run.name)}{runs_dir}"
        print_line(f"cancelled; {path} can be resumed: {status_command} shows its runs")
    elif run.complete:
        print_line(f"{path} completed in the meantime")
    elif run.saved is None:
        print_line(f"cancelled; {path} has no checkpoint")
    else:
        new = "saved now" if run.saved != before else "saved before"
        print_line(f"cancelled; {path} can be resumed from step {run.saved[0]}, {new}")


def _live_jobs(run: RunRecord) -> list[SlurmJob]:
    return live_jobs(run.all_jobs, slurm.jobs({job.id for job in run.all_jobs}))


@dataclass
class _Cancellation:
    """The state of a cancellation.

    marked: jobs that it has listed in ``CANCELLED``. signalled: jobs that were signalled to save.
    cancelled: jobs that scancel has ended. last_ids: the jobs of the last command.
    """

    run: RunRecord
    config: CancelConfig
    print_line: Print
    marked: set[str] = field(default_factory=set)
    signalled: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)
    last_ids: list[str] = field(default_factory=list)

    def end(self, live: list[SlurmJob]) -> None:
        """Cancel the jobs: pending ones first, since one could start when another ends.

        Repeats until none is left: a job may start, or be requeued, between two queries.
        """
        save_until = time.monotonic() + (self.config.wait if self.config.save else 0)
        deadline = save_until + _KILL_GRACE
        error_text = ""
        self._mark()
        while live:
            try:
                self._act(live, time.monotonic() >= save_until)
            except DeniedError as error:
                # A retry would be denied too, and an entry in the file would stop the owner's job.
                self._unmark_denied(error)
                raise
            except SlurmError as error:
                # The job may have ended or started by itself; the next query shows it.
                error_text = str(error)
            if time.monotonic() > deadline:
                names = ", ".join(job.id for job in live)
                raise SlurmError(
                    f"job {names} does not end. {error_text}\nremedy: inspect it with"
                    " `scontrol show job`; it will not be requeued"
                )
            time.sleep(_POLL_SECONDS)
            # A script that has resubmitted itself has a new id.
            self.run = read_run(self.run.path, self.run.name)
            self._mark()
            live = _live_jobs(self.run)
        # Slurm may report the end before the process has released its lock.
        while is_locked(self.run.path / ".lock") and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def _mark(self) -> None:
        """List the run's jobs in ``CANCELLED``."""
        ids = dict.fromkeys(job.id for job in self.run.all_jobs)
        new = [name for name in ids if name not in self.run.cancelled]
        with open_to_append(self.run.path / CANCELLED) as file:
            file.write("".join(f"{name}\n" for name in new).encode())
        self.marked.update(new)

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
            text = f"job {', '.join(unsaved)}: signalled to save and stop"
            self.print_line(f"{text}; {self.config.wait:g} s for it")

    def _unmark_denied(self, error: DeniedError) -> None:
        """Remove the jobs that continue from the file: all that no command has reached.

        A command that is denied for one job takes effect on the others.
        """
        denied = {name for name in self.last_ids if error.names(name)} or set(self.last_ids)
        reached = (self.signalled | self.cancelled | set(self.last_ids)) - denied
        removed = {name for name in self.marked if not any(map(SubmittedJob(name).covers, reached))}
        path = self.run.path / CANCELLED
        remaining = [name for name in path.read_text().split() if name not in removed]
        if remaining:
            # In place: a new file would not keep the permissions of this one.
            path.write_text("".join(f"{name}\n" for name in remaining))
        else:
            path.unlink()
