"""From the command line to a typed configuration, with all problems reported at once.

Hydra composes the YAML of ``conf/`` onto the dataclasses registered here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from modtrain.checkpoint.config import CheckpointsConfig
from modtrain.cluster.config import (
    CancelConfig,
    LogsConfig,
    StatusConfig,
    SubmitConfig,
    is_of_job,
    job_keys,
)
from modtrain.cluster.script import ScriptTask
from modtrain.cluster.submit import Submission
from modtrain.common.errors import ConfigError, Problem, raise_if_any
from modtrain.common.overrides import explain, misread, parse, plain, quoted, search_path
from modtrain.common.renamed_keys import new_name, renamed_in_files
from modtrain.common.shipped import conf_dir
from modtrain.data.config import PrepareConfig
from modtrain.experiments.compare.config import CompareConfig, Comparison, add_controls
from modtrain.experiments.fit.config import FitConfig
from modtrain.experiments.isoflop.config import IsoflopConfig
from modtrain.experiments.pattern_search.config import PatternSearchConfig
from modtrain.experiments.report.config import ReportConfig
from modtrain.experiments.search.config import Search, SearchConfig, join_space
from modtrain.experiments.sweep.launch_overrides import LaunchOverrides
from modtrain.inference.config import EvalRunConfig, GenerateConfig, InspectConfig
from modtrain.training.config import TrainConfig

if TYPE_CHECKING:
    from modtrain.experiments.isoflop.isoflop import Isoflop
    from modtrain.experiments.pattern_search.pattern_search import PatternSearch

SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "plan": TrainConfig,
    "compare": CompareConfig,
    "isoflop": IsoflopConfig,
    "prepare": PrepareConfig,
    "eval": EvalRunConfig,
    "generate": GenerateConfig,
    "inspect": InspectConfig,
    "checkpoints": CheckpointsConfig,
    "submit": SubmitConfig,
    "search": SearchConfig,
    "search-patterns": PatternSearchConfig,
    "fit": FitConfig,
    "report": ReportConfig,
    "status": StatusConfig,
    "logs": LogsConfig,
    "cancel": CancelConfig,
}


def compose(
    verb: str,
    overrides: Sequence[str],
    config_dir: str | None = None,
    extra_keys: Sequence[str] = (),
) -> Any:
    """Return the typed configuration of ``verb`` under Hydra's ``overrides``.

    config_dir: a directory of the user's own YAML, laid out as ``conf/`` is. extra_keys: keys that
    the caller takes itself, which a misspelt one may have meant.

    Raises:
        ConfigError: all overrides that cannot be parsed or do not fit; a file of ``config_dir``
            that is not YAML.
    """
    # Only what `verb` needs: Hydra copies all that is stored at each composition.
    for name, schema in SCHEMAS.items():
        if schema is SCHEMAS[verb] and f"{name}_schema.yaml" not in ConfigStore.instance().repo:
            ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    if config_dir is not None and not Path(config_dir).is_dir():
        problem = Problem("--config-dir", config_dir, "is not a directory", "give one that exists")
        raise ConfigError([problem])
    parsed, problems = parse(overrides)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composer = _Composer(verb, config_dir, extra_keys)
        problems += composer.group_problems(parsed)
        wrong = {problem.key for problem in problems}
        sound = [override for override in parsed if override.get_key_element() not in wrong]
        config, override_problems = composer.compose(sound)
    texts = [o for o in sound if isinstance(OmegaConf.select(config, o.key_or_group), str)]
    problems += override_problems + [mistake for text in texts if (mistake := misread(text))]
    typed = OmegaConf.to_object(config)
    if problems:
        # Report all problems in one message.
        problems += _config_problems(verb, typed, {problem.key for problem in problems})
    raise_if_any(problems)
    return typed


class _Composer:
    """Composes a configuration, and on failure finds the overrides that cause it."""

    def __init__(self, verb: str, config_dir: str | None, extra_keys: Sequence[str]) -> None:
        self.verb = verb
        self.extra_keys = extra_keys
        self.user_dir = None if config_dir is None else Path(config_dir).resolve()
        self.search = search_path(config_dir)

    def compose(self, overrides: list[Override]) -> tuple[DictConfig, list[Problem]]:
        with suppress(HydraException, OmegaConfBaseException):
            return self._raw(overrides), []
        groups = [o for o in overrides if self._options(o.key_or_group)]
        try:
            base = self._raw(groups)
        except (HydraException, OmegaConfBaseException) as error:
            raise self._file_error(groups, error) from None
        problems, good = [], list(groups)
        for override in overrides:
            if override in groups:
                continue
            try:
                self._raw([*groups, override])
                good.append(override)
            except (HydraException, OmegaConfBaseException) as error:
                problems.append(explain(override, base, error, self.extra_keys))
        try:
            return self._raw(good), problems
        except (HydraException, OmegaConfBaseException) as error:
            raise _combined_error(self.verb, good, error) from None

    def group_problems(self, overrides: list[Override]) -> list[Problem]:
        """Find the choices of groups that do not exist."""
        problems = []
        for override in overrides:
            options = self._options(override.key_or_group)
            chosen = override.value()
            for name in chosen if isinstance(chosen, list) else [chosen]:
                if options and name is not None and str(name) not in (*options, "null"):
                    near = difflib.get_close_matches(str(name), options, 1)
                    hint = f"did you mean {near[0]}? " if near else ""
                    remedy = f"{hint}there are: {', '.join(options)}"
                    key = override.get_key_element()
                    problems.append(Problem(key, name, "does not exist", remedy))
        return problems

    def _file_error(self, groups: list[Override], error: Exception) -> ConfigError:
        """Return what is wrong with the files that ``groups`` choose."""
        key = getattr(error.__context__, "full_key", None)
        if self.user_dir is not None and key is not None and new_name(key) is not None:
            return ConfigError(renamed_in_files(self.user_dir))
        return _combined_error(self.verb, groups, error)

    def _options(self, group: str) -> list[str]:
        if not group:
            return []
        # Hydra's own list takes as long as half a composition.
        folders = [conf_dir(), *([self.user_dir] if self.user_dir else [])]
        return sorted({path.stem for f in folders for path in (f / group).glob("*.yaml")})

    def _raw(self, overrides: list[Override]) -> DictConfig:
        lines = [str(override.input_line) for override in overrides]
        try:
            config = hydra_compose(self.verb, overrides=[*self.search, *lines])
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = f"has a file that is not YAML: {' '.join(str(error).split())}"
            problem = Problem("--config-dir", self.user_dir or "", reason, "correct that file")
            raise ConfigError([problem]) from None
        OmegaConf.to_container(config, resolve=True)
        return config


def _combined_error(verb: str, overrides: list[Override], error: Exception) -> ConfigError:
    """Return the error for overrides that only fail together."""
    names = " ".join(str(override.input_line) for override in overrides)
    remedy = "correct the named file, or leave one of them out"
    return ConfigError([Problem(names or verb, "", plain(error), remedy)])


def _config_problems(verb: str, config: Any, reported: set[str]) -> list[Problem]:
    """Return what the configuration itself finds wrong, without the keys ``reported`` already."""
    problems: list[Problem]
    if verb == "plan" or getattr(config, "plan_only", False):
        # A plan needs no name, and need not fit the data at data.path.
        problems = config.problems(needs_name=False)
    else:
        problems = config.problems()
        if isinstance(config, TrainConfig) and "data.path" not in reported:
            problems += config.data.shard_problems("data")
    return [problem for problem in problems if problem.key not in reported]


def compose_arms(overrides: Sequence[str], config_dir: str | None = None) -> Comparison:
    """Return a comparison with the training configurations of its arms.

    Raises:
        ConfigError: the comparison or an arm is wrong; an arm's keys are prefixed by its name.
    """
    config = compose("compare", overrides, config_dir)
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

    parsed, misread_ones = parse([_open_dictionary(text) for text in overrides])
    problems = [replace(problem, key=problem.key.lstrip("+")) for problem in misread_ones]
    launch, others, launch_problems = LaunchOverrides.split(parsed)
    lines = [str(override.input_line) for override in others]
    try:
        config: IsoflopConfig = compose("isoflop", lines, config_dir)
        problems += config.problems()
    except ConfigError as error:
        problems += error.problems
    raise_if_any(problems + launch_problems)
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


def _open_dictionary(override: str) -> str:
    """Let an override add entries to a dictionary of an isoFLOP grid without a plus."""
    dictionaries = ("families", "tokens_per_parameter_of", "lr_rule.factors")
    is_entry = override.startswith(tuple(f"{key}{end}" for key in dictionaries for end in "=."))
    return f"++{override}" if is_entry else override


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

    parsed, problems = parse(overrides)
    launch, others, launch_problems = LaunchOverrides.split(parsed)
    lines = [str(override.input_line) for override in others]
    try:
        config: PatternSearchConfig = compose("search-patterns", lines, config_dir)
        problems += config.problems()
    except ConfigError as error:
        problems += error.problems
    raise_if_any(problems + launch_problems)
    return PatternSearch(
        config,
        _training_part(config),
        compose("train", (), config_dir),
        launch,
        partial(compose_job, config_dir=config_dir),
        config_dir,
    )


SUBMITTED = (
    "train",
    "prepare",
    "eval",
    "compare",
    "isoflop",
    "search",
    "search-patterns",
    "debug",
)
"""The verbs that a job can run, and ``debug``, which keeps nodes for interactive use."""


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
    composed: Any
    try:
        joined = join_space(verb_overrides) if verb == "search" else verb_overrides
        if verb == "isoflop":
            composed = compose_isoflop(verb_overrides, config_dir).config
        elif verb == "search-patterns":
            composed = compose_pattern_search(verb_overrides, config_dir).config
        else:
            composed = compose(verb, joined, config_dir, job_keys())
        if verb == "compare":
            compose_arms(verb_overrides, config_dir)
        problems += composed.problems()
    except ConfigError as error:
        problems += [problem for problem in error.problems if problem not in problems]
        raise ConfigError(problems) from None
    raise_if_any(problems)
    directory = _directory_of(verb, composed)
    if not config.array:
        run = composed if verb == "train" else None
        tasks = [ScriptTask(verb, verb_overrides, directory, run)]
        return Submission(config, tasks, directory, user_dir)
    task_overrides = {
        name: [*verb_overrides, *added, f"name={quoted(f'{composed.name}/{name}')}"]
        for name, added in config.array.items()
    }
    runs = _compose_each(verb, task_overrides, config_dir)
    tasks = [ScriptTask(verb, task_overrides[name], directory / name, runs[name]) for name in runs]
    return Submission(config, tasks, directory, user_dir)


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
