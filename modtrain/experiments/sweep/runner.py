"""Trains a list of runs: one after the other, beside one another, or as an array on Slurm.

Any of Hydra's launchers starts them. Complete and failed runs are skipped, and each run is a
process of its own (`modtrain.experiments.sweep.job_process`). The outcome is read from the
directories, so that runs of an earlier start, and of a launcher that died, are included.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hydra.core.override_parser.types import Override

from modtrain.cluster.config import SubmitConfig
from modtrain.cluster.run_checks import run_problems
from modtrain.common.atomic_io import acquire_lock
from modtrain.common.errors import CheckpointError, ConfigError, Problem, raise_if_any
from modtrain.common.terminal import print_line
from modtrain.distributed.launch import Launch
from modtrain.experiments.sweep.hydra_multirun import Multirun
from modtrain.experiments.sweep.job_process import EXIT_RESUMABLE, STATES, failure_text, state_of
from modtrain.experiments.sweep.jobs import SweepJob, read_jobs, write_jobs
from modtrain.experiments.sweep.launch_overrides import LaunchOverrides
from modtrain.experiments.sweep.slurm_array import launch_on_slurm
from modtrain.training.config import TrainConfig
from modtrain.training.plan import resolve
from modtrain.training.run_directory import RunDirectory, check_resumable
from modtrain.training.stop_signal import STOP
from modtrain.training.tensorboard.hyperparameters import declare

ComposeJob = Callable[[Sequence[str]], SubmitConfig]
_ON_SLURM = "hydra/launcher=slurm"


def refuse_several_processes(key: str) -> None:
    """Raise ConfigError under torchrun or srun: a sweep starts its runs itself."""
    if (processes := Launch.from_environment().world_size) > 1:
        reason = f"starts its runs itself, but {processes} processes were started"
        remedy = f"run it without torchrun or srun, or add {_ON_SLURM}"
        raise ConfigError([Problem(key, "", reason, remedy)])


class Runner:
    """Starts runs as ``launch`` says.

    compose_job: builds the configuration of a Slurm job from its overrides. user_dir: of the user's
    own YAML.

    Raises:
        ConfigError: options of Slurm jobs that do not fit, or without Slurm.
    """

    def __init__(
        self, launch: LaunchOverrides, compose_job: ComposeJob, user_dir: str | None
    ) -> None:
        self.retry, self.user_dir = launch.retry, user_dir
        self.multirun = Multirun(launch.for_hydra, user_dir)
        self.slurm_job = _slurm_job(launch.for_slurm, self.multirun, compose_job)

    @property
    def is_dry_run(self) -> bool:
        """Whether nothing is trained: a script for Slurm is written alone."""
        return self.slurm_job is not None and self.slurm_job.dry_run

    def check(self, config: TrainConfig) -> None:
        """Raise ConfigError if the run cannot run, or its directory holds another run."""
        try:
            if self.slurm_job is not None:
                raise_if_any(run_problems(config, self.slurm_job))
            else:
                resolved, _ = resolve(config, launch=Launch())
                check_resumable(config, resolved)
        except CheckpointError as error:
            remedy = "take the changes back, or give the sweep another name="
            raise ConfigError([Problem("name", config.name, str(error), remedy)]) from None

    def train(self, directory: Path, jobs: Sequence[tuple[SweepJob, TrainConfig]]) -> int:
        """Train the runs that are not complete, and print the states of all.

        directory: has a directory for each run, and lists them in ``sweep.json``.

        Returns:
            0 where every run is complete, or only a script was to be written; 130 or 75 where a
            signal stopped the sweep or one of its runs; else 1.

        Raises:
            CheckpointError: another process sweeps it, or the file system has no locks.
        """
        directory.mkdir(parents=True, exist_ok=True)
        reason = "is being swept by another process: wait for it to end"
        with acquire_lock(directory / ".sweep.lock", CheckpointError(f"{directory} {reason}")):
            write_jobs(directory, [job for job, _ in jobs])
            keys = {key for swept in read_jobs(directory).values() for key in swept}
            declare(directory, keys)
            states = {"stopped", "not started", "running", *(["failed"] if self.retry else [])}
            to_start = [pair for pair in jobs if state_of(RunDirectory.of(pair[1])) in states]
            print_line(f"{directory}: {len(jobs)} jobs, {len(to_start)} to train")
            if to_start and self.slurm_job is not None:
                config_dir = None if self.user_dir is None else Path(self.user_dir)
                launch_on_slurm(to_start, directory, self.slurm_job, config_dir)
                if self.is_dry_run:
                    return 0
            elif to_start:
                self.multirun.launch(to_start, directory)
            return _report(directory, jobs)


def _slurm_job(
    overrides: Sequence[Override], multirun: Multirun, compose_job: ComposeJob
) -> SubmitConfig | None:
    """Return the configuration of the sweep's Slurm jobs; None where they run on this machine."""
    problems = []
    for override in overrides:
        key, _, value = str(override.input_line).partition("=")
        if not multirun.is_on_slurm:
            remedy = f"add {_ON_SLURM}, or leave it out"
            problems.append(Problem(key, value, "is for Slurm jobs", remedy))
        elif override.is_sweep_override():
            reason, remedy = "has several values", "give one: options of the job cannot be swept"
            problems.append(Problem(key, value, reason, remedy))
        elif key.lstrip("+~").split(".")[0] in ("array", "chain"):
            remedy = "leave it out: the sweep's jobs are an array, which is requeued by itself"
            problems.append(Problem(key, value, "is not for a sweep", remedy))
    raise_if_any(problems)
    if not multirun.is_on_slurm:
        return None
    config = compose_job([str(o.input_line) for o in overrides])
    raise_if_any(replace(config, array={"job": []}).problems())
    return config


def _report(directory: Path, jobs: Sequence[tuple[SweepJob, TrainConfig]]) -> int:
    """Print the state of the jobs, and return the exit code."""
    runs = {job.name: RunDirectory.of(config) for job, config in jobs}
    states = {name: state_of(run) for name, run in runs.items()}
    counts = collections.Counter(states.values())
    counts_text = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    print_line(f"{directory}: {counts_text}")
    for name, state in states.items():
        if state == "failed":
            print_line(f"  {name} failed: {failure_text(runs[name])}")
    if counts["failed"]:
        print_line("  the same command with sweep.retry=true restarts these")
    if counts["complete"] == len(states):
        return 0
    if STOP.requested:
        print_line(f"stopped by {STOP.name}: the same command resumes")
        return STOP.exit_code
    return 1 if counts["failed"] else EXIT_RESUMABLE
