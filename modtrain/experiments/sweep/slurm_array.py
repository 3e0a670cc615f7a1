"""The jobs of a sweep on Slurm: an array as `modtrain submit` makes one, awaited.

Hydra's launcher for Slurm, submitit's, does not serve: its jobs lose the signals that come before
Python listens, take SIGTERM for nothing, come back by a count instead of by what there is left to
do, and are asked for by ``sacct``, which many sites do not have. They know no site, no container
and no frozen code, and are handed their work as a pickle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from modtrain.cluster import slurm
from modtrain.cluster.config import SubmitConfig
from modtrain.cluster.runs import json_lines
from modtrain.cluster.slurm import Job, SlurmError
from modtrain.cluster.submit import Work, submit
from modtrain.experiments.sweep.job_state import state_of, write_failure
from modtrain.experiments.sweep.jobs import Job as SweepJob
from modtrain.experiments.sweep.jobs import overrides_of
from modtrain.training.config import TrainConfig
from modtrain.training.run_directory import RunDirectory
from modtrain.training.stop_signal import STOP

# Seconds between two questions to Slurm: often at first, where a mistake shows.
_SOON, _LATER, _SOON_FOR = 2.0, 15.0, 120.0
# squeue may not know a job yet, or not see it for a moment while it is requeued.
_LOOKS_UNTIL_GONE = 3
# So long the controller may be away.
_PATIENCE = 600.0
# These end a job without its script, which would have told why.
_BROKEN = frozenset(("OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"))

Say = Callable[[str], None]


def launch_on_slurm(
    jobs: Sequence[tuple[SweepJob, TrainConfig]],
    directory: Path,
    config: SubmitConfig,
    config_dir: Path | None,
    say: Say,
) -> None:
    """Submit what is not in the queue already, and wait until nothing is left of it there.

    directory: the sweep's. config: of the Slurm jobs. A stop signal ends the waiting, not the jobs.

    Raises:
        ConfigError, ScriptError, SlurmError: Slurm does not take the jobs, or cannot be asked.
    """
    runs = {job.name: RunDirectory.of(run) for job, run in jobs}
    known = {name: job for name, run in runs.items() if (job := _last_job(run))}
    there = slurm.jobs(set(known.values()))
    queued = {name for name, job in known.items() if job in there and not there[job].is_over}
    new = [(job, run) for job, run in jobs if job.name not in queued]
    if new:
        works = [
            Work("train", tuple(overrides_of(job, run)), runs[job.name].path, run)
            for job, run in new
        ]
        array = {job.name: list(job.overrides) for job, _ in new}
        if not submit(works, directory, replace(config, array=array), config_dir):
            return
    for name, run in runs.items():
        say(f"{name}: job {_last_job(run)}")
    _Waiting(dict(runs), say).wait()


@dataclass
class _Waiting:
    """The runs that are awaited, by name, and how often each one's job was looked for in vain."""

    left: dict[str, RunDirectory]
    say: Say
    missed: dict[str, int] = field(default_factory=dict)

    def wait(self) -> None:
        """Wait until Slurm is done with all of them, or a signal comes."""
        began = answered = time.monotonic()
        while self.left and not STOP.requested:
            try:
                self._look()
                answered = time.monotonic()
            except SlurmError as error:
                if not slurm.has_slurm() or time.monotonic() - answered > _PATIENCE:
                    raise
                self.say(f"asks again: {error}")
            is_soon = time.monotonic() - began < _SOON_FOR
            if self.left:
                STOP.pause(_SOON if is_soon else _LATER)
        if self.left:
            jobs = " ".join(str(_last_job(run)) for run in self.left.values())
            self.say(f"the jobs go on: {jobs}; the same command waits for them again")

    def _look(self) -> None:
        # One that submits itself again goes on under another number.
        jobs = {name: str(_last_job(run)) for name, run in self.left.items()}
        found = slurm.jobs(set(jobs.values()))
        for name, number in jobs.items():
            job = found.get(number)
            is_gone = job is None or job.is_over
            self.missed[name] = self.missed.get(name, 0) + 1 if is_gone else 0
            if self.missed[name] >= _LOOKS_UNTIL_GONE:
                self._ended(name, number, job)

    def _ended(self, name: str, number: str, job: Job | None) -> None:
        run = self.left.pop(name)
        state, ended = state_of(run), "" if job is None else job.state
        if (ended in _BROKEN and state in ("stopped", "not started")) or (
            ended == "FAILED" and state == "not started"
        ):
            write_failure(run, "Slurm", f"job {number} ended as {ended}")
        self.say(f"{name}: {state_of(run)}")


def _last_job(run: RunDirectory) -> str | None:
    path = run.path / "jobs.jsonl"
    lines = json_lines(path) if path.is_file() else []
    return str(lines[-1]["job"]) if lines else None
