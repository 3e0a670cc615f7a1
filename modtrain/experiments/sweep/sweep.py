"""A sweep: Hydra's multirun, with directories named by overrides, and resumable.

Hydra's sweeper makes the jobs and any of its launchers starts them. modtrain adds: all jobs are
checked before the first one starts, complete and failed jobs are skipped, and each job is a process
of its own (`modtrain.experiments.sweep.job_process`). The outcome is read from the directories, so
that jobs of an earlier start, and of a launcher that died, are included.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from modtrain.cluster.config import SubmitConfig, is_of_job
from modtrain.cluster.submit import run_problems
from modtrain.common.atomic_io import acquire_lock
from modtrain.common.errors import CheckpointError, ConfigError, Problem, raise_if_any
from modtrain.common.overrides import misread, parse
from modtrain.distributed.launch import Launch
from modtrain.experiments import hparams
from modtrain.experiments.sweep.hydra_multirun import Multirun, print_line
from modtrain.experiments.sweep.job_process import EXIT_RESUMABLE, STATES, failure_text, state_of
from modtrain.experiments.sweep.jobs import SweepJob, expand, read_jobs, write_jobs
from modtrain.experiments.sweep.slurm_array import launch_on_slurm
from modtrain.training.config import TrainConfig
from modtrain.training.plan import resolve
from modtrain.training.run_directory import RunDirectory, check_resumable
from modtrain.training.stop_signal import STOP

Compose = Callable[[Sequence[str]], TrainConfig]
ComposeJob = Callable[[Sequence[str]], SubmitConfig]
_ON_SLURM = "hydra/launcher=slurm"


def sweep(
    overrides: Sequence[str], compose: Compose, compose_job: ComposeJob, user_dir: str | None
) -> int:
    """Train every job of ``overrides`` that is not complete.

    compose: builds a training configuration from overrides with one value each. compose_job: builds
    the configuration of a Slurm job from its overrides. user_dir: of the user's YAML.

    Returns:
        0 where every job is complete; 130 or 75 where a signal stopped the sweep or one of its
        jobs; else 1.

    Raises:
        ConfigError: everything wrong with any job, before one starts.
        CheckpointError: another process sweeps it, or the file system has no locks.
    """
    if (processes := Launch.from_environment().world_size) > 1:
        reason = f"starts its runs itself, but {processes} processes were started"
        remedy = f"run it without torchrun or srun, or add {_ON_SLURM}"
        raise ConfigError([Problem("-m", "", reason, remedy)])
    parsed, problems = parse(overrides, sweeps=True)
    raise_if_any(problems)
    retry, parsed, problems = _split_options(parsed)
    for_hydra = [o for o in parsed if o.key_or_group.startswith(("hydra.", "hydra/"))]
    for_slurm = [o for o in parsed if is_of_job(str(o.input_line))]
    axes = [o for o in parsed if o not in (*for_hydra, *for_slurm)]
    jobs, job_problems = expand(axes)
    problems += job_problems + _sweeper_problems(for_hydra)
    # A name that Hydra parses as a number.
    names = [o for o in axes if o.key_or_group == "name" and not o.is_sweep_override()]
    problems += [mistake for name in names if (mistake := misread(name))]
    if not jobs:
        raise_if_any(problems)
    multirun = Multirun(for_hydra, axes, user_dir)
    try:
        slurm_job = _slurm_job(for_slurm, multirun, compose_job)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    directory, checked = _checked(jobs, compose, multirun, slurm_job, problems)
    directory.mkdir(parents=True, exist_ok=True)
    reason = "is being swept by another process: wait for it to end"
    with acquire_lock(directory / ".sweep.lock", CheckpointError(f"{directory} {reason}")):
        write_jobs(directory, [job for job, _ in checked])
        keys = {key for swept in read_jobs(directory).values() for key in swept}
        hparams.write_experiment(directory, keys)
        states = {"stopped", "not started", "running", *(["failed"] if retry else [])}
        to_start = [pair for pair in checked if state_of(RunDirectory.of(pair[1])) in states]
        print_line(f"{directory}: {len(checked)} jobs, {len(to_start)} to train")
        if to_start and slurm_job is not None:
            config_dir = None if user_dir is None else Path(user_dir)
            launch_on_slurm(to_start, directory, slurm_job, config_dir)
            if slurm_job.dry_run:
                return 0
        elif to_start:
            multirun.launch(to_start, directory)
        return _report(directory, checked)


@dataclass
class _Options:
    """Options of a sweep itself. retry: restart failed jobs; they resume from their checkpoints."""

    retry: bool = False


def _split_options(overrides: Sequence[Override]) -> tuple[bool, list[Override], list[Problem]]:
    """Take ``sweep.retry`` out of ``overrides``; return its value, the rest, and mistakes."""
    sweep_overrides = [o for o in overrides if o.key_or_group.startswith("sweep.")]
    options, problems = OmegaConf.structured(_Options), []
    for override in sweep_overrides:
        name = override.key_or_group.removeprefix("sweep.")
        value = None if override.is_sweep_override() else override.value()
        try:
            options = OmegaConf.merge(options, {name: value})
        except OmegaConfBaseException:
            text = str(override.input_line).partition("=")[2]
            reason = "is not an option of a sweep, or does not fit"
            remedy = "there is sweep.retry=true"
            problems.append(Problem(override.key_or_group, text, reason, remedy))
    return options.retry, [o for o in overrides if o not in sweep_overrides], problems


def _sweeper_problems(overrides: Sequence[Override]) -> list[Problem]:
    reason = "is not supported by modtrain's sweeps, whose jobs are known before the first starts"
    remedy = "leave it out; to search: modtrain search"
    return [
        Problem(o.key_or_group, o.input_line or "", reason, remedy)
        for o in overrides
        if o.key_or_group in ("hydra/sweeper", "hydra.mode")
        or o.key_or_group.startswith(("hydra.sweep.", "hydra.sweeper.", "hydra.run."))
    ]


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


def _checked(
    jobs: Sequence[SweepJob],
    compose: Compose,
    multirun: Multirun,
    slurm_job: SubmitConfig | None,
    problems: list[Problem],
) -> tuple[Path, list[tuple[SweepJob, TrainConfig]]]:
    """Return the sweep's directory, and the jobs under their final names with their configurations.

    Raises:
        ConfigError: the problems of all jobs; problems that all share are listed once.
    """
    wrong: dict[Problem, list[str]] = {}
    checked: list[tuple[SweepJob, TrainConfig]] = []
    base: TrainConfig | None = None
    stored: dict[frozenset[tuple[str, str]], str] | None = None
    for expanded in jobs:
        job = expanded
        try:
            base = compose(job.overrides)
            if stored is None:
                listed = read_jobs(RunDirectory.of(base).path)
                stored = {frozenset(swept.items()): name for name, swept in listed.items()}
            # Under a key's new name the job would have another directory than before.
            job = replace(job, name=stored.get(frozenset(job.swept.items()), job.name))
            config = replace(base, name=f"{base.name}/{job.name}" if base.name else None)
            checked.append((job, config))
            _check(config, slurm_job)
        except ConfigError as error:
            for problem in error.problems:
                wrong.setdefault(problem, []).append(job.name)
    for problem, names in wrong.items():
        everywhere = len(names) == len(jobs)
        keys = [problem.key] if everywhere else [f"{name}: {problem.key}" for name in names]
        problems += [replace(problem, key=key) for key in keys]
    raise_if_any(problems + multirun.problems())
    assert base is not None  # noqa: S101  (every job had an error, or one is composed)
    return RunDirectory.of(base).path, checked


def _check(config: TrainConfig, slurm_job: SubmitConfig | None) -> None:
    """Raise ConfigError if the job cannot run, or its directory holds another run."""
    try:
        if slurm_job is not None:
            raise_if_any(run_problems(config, slurm_job))
        else:
            resolved, _ = resolve(config, launch=Launch())
            check_resumable(config, resolved)
    except CheckpointError as error:
        remedy = "take the changes back, or give the sweep another name="
        raise ConfigError([Problem("name", config.name, str(error), remedy)]) from None


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
