"""The jobs of a sweep on Slurm: submits an array as `modtrain submit` does, and waits for it.

Hydra's launcher for Slurm (submitit) is not used: its jobs lose signals that arrive before Python
handles them, ignore SIGTERM, are requeued a fixed number of times instead of until they are done,
and are queried with ``sacct``, which many sites lack. They have no site configuration, no container
and no frozen code, and receive their work as a pickle.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from modtrain.cluster import slurm
from modtrain.cluster.config import SubmitConfig
from modtrain.cluster.runs import read_job_ids
from modtrain.cluster.script import ScriptTask
from modtrain.cluster.slurm import SlurmError
from modtrain.cluster.submit import Submission, submit
from modtrain.common.terminal import print_line
from modtrain.experiments.sweep.job_process import state_of, write_failure
from modtrain.experiments.sweep.jobs import SweepJob, overrides_of
from modtrain.training.config import TrainConfig
from modtrain.training.run_directory import RunDirectory
from modtrain.training.stop_signal import STOP

# Seconds between two queries to Slurm: shorter at first, when mistakes show.
_FIRST_POLL_SECONDS, _POLL_SECONDS, _FIRST_POLLS_FOR = 2.0, 15.0, 120.0
# squeue may not list a job yet, or not for a moment while it is requeued.
_POLLS_UNTIL_GONE = 3
# Seconds for which the controller may be unreachable.
_TIMEOUT = 600.0
# States in which a job ends before its script can record why.
_SLURM_FAILURES = frozenset(("OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"))


def launch_on_slurm(
    jobs: Sequence[tuple[SweepJob, TrainConfig]],
    directory: Path,
    config: SubmitConfig,
    config_dir: Path | None,
) -> None:
    """Submit the jobs that are not in the queue, and wait until all have ended.

    directory: the sweep's. config: of the Slurm jobs. A stop signal ends the waiting, not the jobs.

    Raises:
        ConfigError, ScriptError, SlurmError: Slurm rejects the jobs, or does not answer.
    """
    runs = {job.name: RunDirectory.of(run) for job, run in jobs}
    last_jobs = {name: job for name, run in runs.items() if (job := _last_job(run))}
    jobs_by_id = slurm.jobs(set(last_jobs.values()))
    queued = {job_id for job_id, job in jobs_by_id.items() if not job.is_finished}
    new = [(job, run) for job, run in jobs if last_jobs.get(job.name) not in queued]
    if new:
        tasks = [
            ScriptTask("train", overrides_of(job, run), runs[job.name].path, run)
            for job, run in new
        ]
        array = {job.name: list(job.overrides) for job, _ in new}
        submit(Submission(replace(config, array=array), tasks, directory, config_dir))
        if config.dry_run:
            return
    for name, run in runs.items():
        print_line(f"{name}: job {_last_job(run)}")
    _wait(runs)


def _wait(remaining: dict[str, RunDirectory]) -> None:
    """Wait until the jobs of all runs, by name, have ended, or a signal arrives."""
    began = last_answer = time.monotonic()
    num_missed: Counter[str] = Counter()
    shown = ""
    while remaining and not STOP.requested:
        try:
            waiting = _remove_ended(remaining, num_missed)
            last_answer = time.monotonic()
            if waiting and waiting != shown:
                print_line(waiting)
            shown = waiting
        except SlurmError as error:
            if not slurm.has_slurm() or time.monotonic() - last_answer > _TIMEOUT:
                raise
            print_line(f"retrying: {error}")
        is_recent = time.monotonic() - began < _FIRST_POLLS_FOR
        if remaining:
            STOP.pause(_FIRST_POLL_SECONDS if is_recent else _POLL_SECONDS)
    if remaining:
        jobs = " ".join(str(_last_job(run)) for run in remaining.values())
        print_line(f"the jobs continue: {jobs}; the same command waits for them again")


def _remove_ended(remaining: dict[str, RunDirectory], num_missed: Counter[str]) -> str:
    """Query Slurm once; return why jobs wait. num_missed: how often a run's job was not listed."""
    # A job that resubmits itself has a new id.
    jobs = {name: str(_last_job(run)) for name, run in remaining.items()}
    jobs_by_id = slurm.jobs(set(jobs.values()))
    for name, number in jobs.items():
        job = jobs_by_id.get(number)
        num_missed[name] = num_missed[name] + 1 if job is None or job.is_finished else 0
        if num_missed[name] < _POLLS_UNTIL_GONE:
            continue
        run = remaining.pop(name)
        state, ended = state_of(run), "" if job is None else job.state
        if (ended in _SLURM_FAILURES and state in ("stopped", "not started")) or (
            ended == "FAILED" and state == "not started"
        ):
            write_failure(run, "Slurm", f"job {number} ended as {ended}")
        print_line(f"{name}: {state_of(run)}")
    # One that waits for the run's present job to stop does not delay the run.
    known = [jobs_by_id[number] for number in jobs.values() if number in jobs_by_id]
    waiting = [job for job in known if job.reason != "Dependency"]
    reasons = Counter(job.reason or "Slurm gives no reason" for job in waiting if job.is_pending)
    return ", ".join(f"{count} pending: {reason}" for reason, count in sorted(reasons.items()))


def _last_job(run: RunDirectory) -> str | None:
    ids = read_job_ids(run.path)
    return ids[-1] if ids else None
