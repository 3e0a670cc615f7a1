"""From the command line to a typed configuration, with all problems reported at once.

Hydra composes the YAML of ``conf/`` onto the dataclasses registered here.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from modtrain.cli.home_paths import expand_config
from modtrain.cli.schemas import VERBS, schema_of
from modtrain.cli.stray_words import advised_keys, is_word, word_problems
from modtrain.common.config_keys import added_keys
from modtrain.common.errors import ConfigError, Problem, raise_if_any
from modtrain.common.file_mistakes import OF_HYDRA, has_section, mistakes_in_file
from modtrain.common.other_tools import value_here
from modtrain.common.overrides import (
    explain,
    misread,
    not_a_key,
    opened,
    parse,
    plain,
    search_path,
    with_spelling,
)
from modtrain.common.renamed_keys import new_name, renamed_in_files, section_of
from modtrain.common.shipped import conf_dir
from modtrain.common.spelling import in_quotes, list_in_quotes
from modtrain.common.yaml_texts import misread_in_folder
from modtrain.data.config import PrepareConfig
from modtrain.training.config import TrainConfig
from modtrain.training.named_runs import name_of

_CHOOSE = "choose it in the file's defaults, as - override /{key}: {value}"

SCHEMAS: dict[str, type] = {verb: schema_of(verb) for verb in VERBS}


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
    parsed, problems = parse([text for text in overrides if not is_word(text)])
    problems += [_of_hydra(o) for o in parsed if o.key_or_group.startswith(("hydra.", "hydra/"))]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composer = _Composer(verb, config_dir, extra_keys)
        problems += composer.group_problems(parsed)
        wrong = {problem.key for problem in problems}
        sound = [override for override in parsed if override.get_key_element() not in wrong]
        config, override_problems = composer.compose(sound)
    problems = [with_spelling(problem, config) for problem in problems]
    problems += composer.added_key_problems(sound, config)
    of_words = word_problems(verb, overrides, config, composer.options)
    joined = {problem.key for problem in of_words if problem.value}
    problems = [p for p in problems + override_problems if p.key.lstrip("+") not in joined]
    problems += of_words
    texts = [o for o in sound if _holds_text(OmegaConf.select(config, o.key_or_group))]
    problems += [mistake for text in texts if (mistake := misread(text))]
    if composer.user_dir is not None:
        problems += misread_in_folder(composer.user_dir, config)
    typed = expand_config(OmegaConf.to_object(config))
    problems += _unused_beside_path(sound, typed)
    if problems:
        # Report all problems in one message.
        reported = {problem.key.lstrip("+") for problem in problems} | advised_keys(problems)
        problems += [
            problem
            for problem in _config_problems(verb, typed, reported)
            # Of a section in which a key is wrong already: it may be right once that is.
            if not any(key.startswith(f"{problem.key}.") for key in reported)
        ]
    raise_if_any(problems)
    return _with_run_names(typed)


def _holds_text(value: Any) -> bool:
    """Whether ``value`` is a text, or a list of texts."""
    return isinstance(value, str) or (
        OmegaConf.is_list(value) and value._metadata.element_type is str
    )


def _unused_beside_path(overrides: list[Override], config: Any) -> list[Problem]:
    """Find what was said of a tokenizer to train where one is given; defaults are no problem."""
    if not isinstance(config, PrepareConfig) or config.tokenizer.path is None:
        return []
    keys = ("tokenizer.vocab_size", "tokenizer.train_bytes")
    reason = "is of a tokenizer that is trained, and tokenizer.path gives one"
    return [
        Problem(
            o.key_or_group, str(o.input_line).partition("=")[2], reason, "leave one of them out"
        )
        for o in overrides
        if o.key_or_group in keys
    ]


def _with_run_names(config: Any) -> Any:
    """Return ``config`` with the names of runs that were given as paths."""
    if isinstance(getattr(config, "run", None), str):
        return replace(config, run=name_of(config.runs_dir, config.run))
    if not isinstance(config, TrainConfig):
        return config
    branch, init = config.branch, config.init
    if branch.run is not None:
        config = replace(config, branch=replace(branch, run=name_of(config.runs_dir, branch.run)))
    if init.run is not None:
        run = name_of(init.runs_dir or config.runs_dir, init.run)
        config = replace(config, init=replace(init, run=run))
    return config


def _of_hydra(override: Override) -> Problem:
    """Return the problem of an override of Hydra itself, which a single configuration ignores."""
    reason, remedy = "is of Hydra's multirun", "leave it out, or sweep with modtrain train -m"
    value = str(override.input_line).partition("=")[2]
    return Problem(override.get_key_element(), value, reason, remedy)


class _Composer:
    """Composes a configuration, and on failure finds the overrides that cause it."""

    def __init__(self, verb: str, config_dir: str | None, extra_keys: Sequence[str]) -> None:
        self.verb = verb
        self.extra_keys = extra_keys
        self.user_dir = None if config_dir is None else Path(config_dir).resolve()
        self.search = search_path(config_dir)
        self.groups = sorted({path.parent.name for path in conf_dir().glob("*/*.yaml")})

    def compose(self, overrides: list[Override]) -> tuple[DictConfig, list[Problem]]:
        with suppress(HydraException, OmegaConfBaseException):
            return self._raw(overrides), []
        groups = [o for o in overrides if self.options(o.key_or_group)]
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
                problems.append(explain(override, base, error, self.extra_keys, self.groups))
        try:
            return self._raw(good), problems
        except (HydraException, OmegaConfBaseException) as error:
            raise _combined_error(self.verb, good, error) from None

    def group_problems(self, overrides: list[Override]) -> list[Problem]:
        """Find the choices of groups that do not exist."""
        problems = []
        for override in overrides:
            options = self.options(override.key_or_group)
            chosen = override.value()
            for name in chosen if isinstance(chosen, list) else [chosen]:
                if options and name is not None and str(name) not in (*options, "null"):
                    key = override.get_key_element()
                    remedy = _choice_remedy(key.lstrip("+"), str(name), options)
                    problems.append(Problem(key, name, "does not exist", remedy))
        return problems

    def added_key_problems(self, overrides: list[Override], config: DictConfig) -> list[Problem]:
        """Find what a ``+`` added to ``config`` that nothing reads."""
        problems = []
        for key in added_keys(config):
            givers = [o for o in overrides if f"{o.key_or_group}.".startswith(f"{key}.")]
            problems += [not_a_key(giver, config, self.extra_keys, self.groups) for giver in givers]
        return problems

    def _file_error(self, groups: list[Override], error: Exception) -> ConfigError:
        """Return what is wrong with the files that ``groups`` choose."""
        key = getattr(error.__context__, "full_key", None)
        if self.user_dir is not None and key is not None and new_name(key) is not None:
            return ConfigError(renamed_in_files(self.user_dir))
        if self.user_dir is not None and (mistakes := self._mistakes_in_files(groups)):
            return ConfigError(mistakes)
        return _combined_error(self.verb, groups, error)

    def _mistakes_in_files(self, groups: list[Override]) -> list[Problem]:
        """Find what is wrong with the user's own files that ``groups`` choose."""
        fields: Any = OmegaConf.structured(schema_of(self.verb))
        problems = []
        for override in groups:
            name = Path(override.key_or_group, f"{override.value()}.yaml")
            path = Path(self.user_dir or "", name)
            if path.is_file():
                section = section_of(name, path.read_text(encoding="utf-8"))
                if has_section(fields, section):
                    problems += mistakes_in_file(
                        path, fields, self.options, _CHOOSE, section, OF_HYDRA
                    )
        return problems

    def options(self, group: str) -> list[str]:
        """Return the choices of a group; empty for what is none."""
        return choices_of(group, self.user_dir)

    def _raw(self, overrides: list[Override]) -> DictConfig:
        lines = [opened(str(override.input_line)) for override in overrides]
        try:
            config = hydra_compose(self.verb, overrides=[*self.search, *lines])
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = f"has a file that is not YAML: {' '.join(str(error).split())}"
            problem = Problem("--config-dir", self.user_dir or "", reason, "correct that file")
            raise ConfigError([problem]) from None
        OmegaConf.to_container(config, resolve=True)
        return config


def choices_of(group: str, user_dir: Path | None = None) -> list[str]:
    """Return the choices of a group, those in ``user_dir`` too; empty for what is none."""
    if not group:
        return []
    # Hydra's own list takes as long as half a composition.
    folders = [conf_dir(), *([user_dir] if user_dir else [])]
    return sorted({path.stem for f in folders for path in (f / group).glob("*.yaml")})


def _choice_remedy(group: str, name: str, options: list[str]) -> str:
    """Return what to write for a choice that a group does not have."""
    there = f"there are: {', '.join(options)}"
    here = value_here(group, name)
    near = [here] if here in options else difflib.get_close_matches(name, options, 1)
    if near:
        return f"did you mean {near[0]}? {there}"
    if group == "data" or "/" in name:
        if group == "data":
            return f"write {in_quotes('data.path', name)}; {there}"
        if group == "corpus":
            return f"write {list_in_quotes('sources', name)}; {there}"
    return there


def _combined_error(verb: str, overrides: list[Override], error: Exception) -> ConfigError:
    """Return the error for overrides that only fail together."""
    names = " ".join(str(override.input_line) for override in overrides)
    remedy = "correct the named file, or leave one of them out"
    return ConfigError([Problem(names or verb, "", plain(error), remedy)])


def _config_problems(verb: str, config: Any, reported: set[str]) -> list[Problem]:
    """Return what the configuration itself finds wrong, without the keys ``reported`` already."""
    problems: list[Problem]
    # A plan need not fit the data at data.path.
    is_plan = verb == "plan" or getattr(config, "plan_only", False)
    # A run has a name made for it, and a plan needs none.
    problems = (
        config.problems(needs_name=False) if is_plan or verb == "train" else config.problems()
    )
    if isinstance(config, TrainConfig) and not is_plan and "data.path" not in reported:
        problems += config.data.shard_problems("data")
    return [problem for problem in problems if problem.key not in reported]
