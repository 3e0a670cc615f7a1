"""A sweep: Hydra's multirun, with directories named by overrides, and resumable.

Hydra's sweeper makes the jobs, all of which are checked before the first one starts;
`modtrain.experiments.sweep.runner` trains them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from modtrain.common.errors import ConfigError, Problem, raise_if_any
from modtrain.common.overrides import misread, parse
from modtrain.experiments.sweep.jobs import SweepJob, expand, read_jobs
from modtrain.experiments.sweep.launch_overrides import LaunchOverrides
from modtrain.experiments.sweep.runner import ComposeJob, Runner, refuse_several_processes
from modtrain.training.config import TrainConfig
from modtrain.training.run_directory import RunDirectory

Compose = Callable[[Sequence[str]], TrainConfig]


def sweep(
    overrides: Sequence[str], compose: Compose, compose_job: ComposeJob, user_dir: str | None
) -> int:
    """Train every job of ``overrides`` that is not complete.

    compose: builds a training configuration from overrides with one value each. compose_job: builds
    the configuration of a Slurm job from its overrides. user_dir: of the user's YAML.

    Returns:
        The exit code, as `Runner.train` does.

    Raises:
        ConfigError: everything wrong with any job, before one starts.
        CheckpointError: another process sweeps it, or the file system has no locks.
    """
    refuse_several_processes("-m")
    parsed, problems = parse(overrides, sweeps=True)
    raise_if_any(problems)
    launch, axes, problems = LaunchOverrides.split(parsed)
    jobs, job_problems = expand(axes)
    problems = job_problems + problems
    # A name that Hydra parses as a number.
    names = [o for o in axes if o.key_or_group == "name" and not o.is_sweep_override()]
    problems += [mistake for name in names if (mistake := misread(name))]
    if not jobs:
        raise_if_any(problems)
    try:
        runner = Runner(launch, compose_job, user_dir)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    directory, checked = _checked(jobs, compose, runner, problems)
    return runner.train(directory, checked)


def _checked(
    jobs: Sequence[SweepJob], compose: Compose, runner: Runner, problems: list[Problem]
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
            runner.check(config)
        except ConfigError as error:
            for problem in error.problems:
                wrong.setdefault(problem, []).append(job.name)
    problems += shared_problems(wrong, len(jobs))
    if base is not None and base.name is None:
        problems += base.name_problems()
    raise_if_any(problems + runner.multirun.problems())
    assert base is not None  # noqa: S101  (every job had an error, or one is composed)
    return RunDirectory.of(base).path, checked


def shared_problems(wrong: dict[Problem, list[str]], num_jobs: int) -> list[Problem]:
    """Return the problems of jobs with the jobs' names, and once those that all jobs share.

    wrong: the names of the jobs that have a problem.
    """
    problems: list[Problem] = []
    for problem, names in wrong.items():
        everywhere = len(names) == num_jobs
        keys = [problem.key] if everywhere else [f"{name}: {problem.key}" for name in names]
        problems += [replace(problem, key=key) for key in keys]
    return problems
