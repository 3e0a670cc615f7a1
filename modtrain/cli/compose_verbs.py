"""From the command line to arms, trials, grids and jobs: verbs that need several configurations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modtrain.cli.compose import compose
from modtrain.cli.schemas import SUBMITTED
from modtrain.cluster.config import SubmitConfig, is_of_job, job_keys
from modtrain.cluster.run_checks import awaits_data
from modtrain.cluster.script import ScriptTask
from modtrain.cluster.submit import Submission
from modtrain.common.errors import ConfigError, Problem, raise_if_any
from modtrain.common.overrides import parse
from modtrain.common.spelling import quoted
from modtrain.experiments.compare.config import CompareConfig, Comparison, add_controls
from modtrain.experiments.search.config import Search, SearchConfig, join_space
from modtrain.experiments.sweep.launch_overrides import LaunchOverrides
from modtrain.training.config import TrainConfig
from modtrain.training.plan import resolve
from modtrain.training.run_names import claim_name

if TYPE_CHECKING:
    from modtrain.experiments.isoflop.isoflop import Isoflop
    from modtrain.experiments.pattern_search.pattern_search import PatternSearch


def compose_arms(overrides: Sequence[str], config_dir: str | None = None) -> Comparison:
    """Return a comparison with the training configurations of its arms.

    Raises:
        ConfigError: the comparison or an arm is wrong; an arm's keys are prefixed by its name.
    """
    config = compose("compare", overrides, config_dir)
    if _asks_for_report(config, overrides):
        return Comparison(config, {})
    raise_if_any(config.problems())
    overrides_of = {arm: [*overrides, *added] for arm, added in config.arms.items()}
    composed: dict[str, CompareConfig] = _compose_each("compare", overrides_of, config_dir)
    controls: dict[str, str] = {}
    if config.controls:
        composed, controls = add_controls(composed)
    if missing := [name for name in config.only if name not in composed]:
        remedy = f"there are: {', '.join(composed)}"
        raise ConfigError([Problem("only", name, "is not an arm", remedy) for name in missing])
    arms = {
        arm: _runs_of_an_arm(run, f"{config.name}/{arm}", config.seeds)
        for arm, run in composed.items()
        if not config.only or arm in config.only
    }
    return Comparison(config, arms, controls)


def _asks_for_report(config: CompareConfig, overrides: Sequence[str]) -> bool:
    """Whether a comparison that has a report is named, and nothing of what it compares is given."""
    asked = {override.key_or_group for override in parse(overrides)[0]}
    if not asked <= {"name", "runs_dir", "equivalence_margin"} or config.name is None:
        return False
    return Comparison(config, {}).report.is_file()


def _compose_each(
    verb: str, named: Mapping[str, Sequence[str]], config_dir: str | None
) -> dict[str, Any]:
    """Compose the overrides of each name; the problems of all are raised, prefixed by the names."""
    composed: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, overrides in named.items():
        try:
            composed[name] = compose(verb, overrides, config_dir)
        except ConfigError as error:
            problems += [replace(p, key=f"{name}: {p.key}") for p in error.problems]
    raise_if_any(problems)
    return composed


def _training_part(config: TrainConfig, **changes: Any) -> TrainConfig:
    """Return the training configuration that ``config`` extends, with ``changes``."""
    values = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
    return TrainConfig(**values | changes)


def compose_search(overrides: Sequence[str], config_dir: str | None = None) -> Search:
    """Return a search, whose ``space.KEY=VALUE`` name ranges of values.

    Raises:
        ConfigError: everything wrong with it and with what its trials share.
    """
    shared = join_space(overrides)
    config: SearchConfig = compose("search", shared, config_dir)
    raise_if_any(config.problems())

    def trial(trial_overrides: Sequence[str], name: str) -> TrainConfig:
        composed = compose("search", [*shared, *trial_overrides], config_dir)
        return _training_part(composed, name=name)

    return Search(config, trial)


def _runs_of_an_arm(config: TrainConfig, name: str, seeds: list[int]) -> list[TrainConfig]:
    if not seeds:
        return [_training_part(config, name=name)]
    return [
        _training_part(
            config, name=f"{name}/seed_{seed}", seed=seed, data=replace(config.data, seed=seed)
        )
        for seed in seeds
    ]


def compose_isoflop(overrides: Sequence[str], config_dir: str | None = None) -> Isoflop:
    """Return a grid at equal FLOPs with the training configurations of its families.

    Raises:
        ConfigError: the grid or a family is wrong; a family's keys are prefixed by its name.
    """
    from modtrain.experiments.isoflop.isoflop import Isoflop  # noqa: PLC0415  (takes a second)

    config, launch, lines = _compose_launched("isoflop", overrides, config_dir)
    families = _compose_each(
        "isoflop", {name: [*lines, *added] for name, added in config.families.items()}, config_dir
    )
    return Isoflop(
        config,
        {name: _training_part(family) for name, family in families.items()},
        compose("train", (), config_dir),
        launch,
        partial(compose_job, config_dir=config_dir),
        config_dir,
    )


def as_composed(verb: str, overrides: Sequence[str]) -> list[str]:
    """Return the overrides as `compose` takes them for ``verb``."""
    return join_space(overrides) if verb == "search" else list(overrides)


def _compose_launched(
    verb: str, overrides: Sequence[str], config_dir: str | None
) -> tuple[Any, LaunchOverrides, list[str]]:
    """Compose a verb that starts runs; return how it starts them, and the other overrides too.

    Raises:
        ConfigError: everything wrong with either.
    """
    parsed, _ = parse(overrides)
    launch, others, launch_problems = LaunchOverrides.split(parsed)
    # What cannot be parsed stays: its problems come from composing.
    launching = {str(o.input_line) for o in parsed} - {str(o.input_line) for o in others}
    lines = [text for text in overrides if text not in launching]
    problems: list[Problem] = []
    try:
        config = compose(verb, lines, config_dir)
        problems += config.problems()
    except ConfigError as error:
        problems += error.problems
    raise_if_any(problems + launch_problems)
    return config, launch, lines


def compose_pattern_search(
    overrides: Sequence[str], config_dir: str | None = None
) -> PatternSearch:
    """Return a search over depth patterns with what its candidates share.

    Raises:
        ConfigError: everything wrong with it.
    """
    from modtrain.experiments.pattern_search.pattern_search import (  # noqa: PLC0415
        PatternSearch,  # takes a second
    )

    config, launch, _ = _compose_launched("search-patterns", overrides, config_dir)
    return PatternSearch(
        config,
        _training_part(config),
        compose("train", (), config_dir),
        launch,
        partial(compose_job, config_dir=config_dir),
        config_dir,
    )


def compose_submission(words: Sequence[str], config_dir: str | None = None) -> Submission:
    """Return the job that ``submit`` describes: a verb, its overrides and the job's own.

    Raises:
        ConfigError: everything wrong with either.
    """
    verb, *overrides = words or [""]
    user_dir = None if config_dir is None else Path(config_dir)
    if verb not in SUBMITTED:
        remedy = f"write modtrain submit VERB ..., VERB one of {', '.join(SUBMITTED)}"
        raise ConfigError([Problem("submit", verb, "is not a verb that a job can run", remedy)])
    verb_overrides = [text for text in overrides if verb != "debug" and not is_of_job(text)]
    job_overrides = [text for text in overrides if text not in verb_overrides]
    problems: list[Problem] = []
    try:
        config = compose_job(job_overrides, config_dir)
    except ConfigError as error:
        config, problems = SubmitConfig(), error.problems
    problems += [p for p in config.problems() if not problems]
    if verb == "debug":
        raise_if_any(problems)
        directory = Path("runs/debug")
        return Submission(config, [ScriptTask(verb, (), directory)], directory, user_dir)
    if config.array and verb != "train":
        remedy = "submit them one by one, or leave array out"
        problems.append(Problem("array", verb, "is for train alone", remedy))
    if config.workers and verb != "search":
        reason, remedy = f"and {verb} has one worker", "leave it out: a search alone has several"
        problems.append(Problem("workers", config.workers, reason, remedy))
    try:
        composed = _compose_submitted(verb, verb_overrides, config_dir)
        if getattr(composed, "max_time", None) is not None:
            remedy = "write time=…, the limit of the job"
            reason = "would stop and requeue a job again and again"
            problems.append(Problem("max_time", composed.max_time, reason, remedy))
        has_own_name = verb == "train" and not config.array
        problems += composed.problems(needs_name=False) if has_own_name else composed.problems()
    except ConfigError as error:
        problems += [problem for problem in error.problems if problem not in problems]
        raise ConfigError(problems) from None
    raise_if_any(problems)
    if has_own_name and composed.name is None:
        composed, verb_overrides = _with_name(composed, verb_overrides, config)
    directory = _directory_of(verb, composed)
    runs_dir = str(getattr(composed, "runs_dir", "runs"))
    if not config.array:
        run = composed if verb == "train" else None
        tasks = [ScriptTask(verb, verb_overrides, directory, run)]
        return Submission(config, tasks, directory, user_dir, runs_dir)
    task_overrides = {
        name: [*verb_overrides, *added, f"name={quoted(f'{composed.name}/{name}')}"]
        for name, added in config.array.items()
    }
    runs = _compose_each(verb, task_overrides, config_dir)
    tasks = [ScriptTask(verb, task_overrides[name], directory / name, runs[name]) for name in runs]
    return Submission(config, tasks, directory, user_dir, runs_dir)


def _compose_submitted(verb: str, overrides: Sequence[str], config_dir: str | None) -> Any:
    """Return the configuration of what a job runs; raises ConfigError."""
    if verb == "isoflop":
        return compose_isoflop(overrides, config_dir).config
    if verb == "search-patterns":
        return compose_pattern_search(overrides, config_dir).config
    joined = join_space(overrides) if verb == "search" else overrides
    composed = compose(verb, joined, config_dir, job_keys())
    if verb == "compare":
        compose_arms(overrides, config_dir)
    return composed


def _with_name(
    run: TrainConfig, overrides: Sequence[str], job: SubmitConfig
) -> tuple[TrainConfig, list[str]]:
    """Return a run and its overrides with a name, which each start of its job then has.

    Raises:
        ConfigError: everything wrong with the run.
    """
    resolved = run if awaits_data(run, job) else resolve(run, launch=job.launch)[0]
    # The environment may be that of another job, in which this one is submitted.
    name = claim_name(resolved, environment={})
    return replace(run, name=name), [*overrides, f"name={quoted(name)}"]


def compose_job(overrides: Sequence[str], config_dir: str | None = None) -> SubmitConfig:
    """Return the configuration of a Slurm job, whatever it runs; raises ConfigError."""
    # Hydra parses 12_3 as the number 123; for Slurm it is a task of an array.
    quoted_overrides = [re.sub(r"^after=(\d+_\d+)$", r"after='\1'", text) for text in overrides]
    config: SubmitConfig = compose("submit", quoted_overrides, config_dir)
    return config


def _directory_of(verb: str, config: Any) -> Path:
    """Return the directory of a job's files: its run's, if it has one."""
    if verb == "prepare":
        return Path("runs") / f"prepare-{Path(config.output).name}"
    name = {"eval": "run", "search": "study"}.get(verb, "name")
    return Path(config.runs_dir) / str(getattr(config, name))
