"""``from=RUN``: the configuration of a run, or of a file, as the base of a new one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from modtrain.cli.compose import SCHEMAS, choices_of, compose
from modtrain.common.config_keys import all_keys
from modtrain.common.errors import ConfigError, Problem, raise_if_any
from modtrain.common.file_mistakes import mistakes_in_file
from modtrain.common.overrides import SOURCES, parse, plain
from modtrain.common.reading import UnreadableError, read_yaml
from modtrain.common.renamed_keys import flatten, translate
from modtrain.common.shipped import conf_dir
from modtrain.common.spelling import node_of
from modtrain.common.yaml_texts import misread_in_file
from modtrain.experiments.sweep.jobs import as_value
from modtrain.training.config import TrainConfig
from modtrain.training.named_runs import missing_run, name_of
from modtrain.training.run_directory import RunDirectory

_KEY = "from"
# What each run has of its own: taken from a file, and not from another run.
_OWN = ("name", "resume", "max_time")
_CHOOSE = "take it out of the file, and add {key}={value} to the command"
# What a run starts from is one choice: a new one keeps nothing of the base's.
_STARTING_POINT = ("branch", "init")


def expand_base(verb: str, words: Sequence[str], config_dir: str | None) -> list[str]:
    """Return ``words`` with the overrides that ``from=RUN`` stands for in its place.

    They come before the others, which so win. A group that is chosen beside it (``model=tiny``)
    keeps nothing of the run's; nor does another starting point (``init.run``, ``branch.run``). The
    name of a run is that run's own; the name in a file is taken.

    Raises:
        ConfigError: there is no such run or file; it does not fit; the verb trains nothing.
    """
    given = [word for word in words if word.partition("=")[0] == _KEY]
    if not given:
        return list(words)
    # The first word of `submit` and `config` is the verb that has the configuration.
    first = [words[0]] if verb in ("submit", "config") else []
    others = [word for word in words[len(first) :] if word not in given]
    composed = first[0] if first else verb
    schema = SCHEMAS.get(composed, object)
    value = given[-1].partition("=")[2]
    if not issubclass(schema, TrainConfig):
        reason, remedy = "is for verbs that train", "leave it out"
        raise ConfigError([Problem(_KEY, value, reason, remedy)])
    parsed, _ = parse(others, sweeps=True)
    chosen = [o.key_or_group for o in parsed if (conf_dir() / o.key_or_group).is_dir()]
    if "experiment" in chosen:
        reason = "cannot be combined with experiment: both are the base"
        raise ConfigError([Problem(_KEY, value, reason, "leave one of them out")])
    groups = [
        str(o.input_line) for o in parsed if o.key_or_group in chosen and not o.is_sweep_override()
    ]
    runs_dir = next((str(o.value()) for o in parsed if o.key_or_group == "runs_dir"), "runs")
    whole = _dictionaries(schema)
    base = flatten(_read(value, runs_dir, schema), whole=whole)
    sections = {o.key_or_group.partition(".")[0] for o in parsed}
    replaced = [*chosen, *(_STARTING_POINT if sections & {*_STARTING_POINT} else ())]
    defaults = flatten(asdict(compose(composed, groups, config_dir)), whole=whole)
    # With a plus a dictionary takes any names; the sources of a mixture get theirs later.
    opened = {key: f"++{key}" for key in whole if key != SOURCES}
    overrides = [
        f"{opened.get(key, key)}={as_value(content)}"
        for key, content in base.items()
        if key.partition(".")[0] not in replaced and defaults.get(key, ...) != content
    ]
    return [*first, *overrides, *others]


def _find(value: str, runs_dir: str) -> Path:
    """Return the file of the run or file ``value``; raises ConfigError where there is none."""
    text = value.strip("'\"")
    paths = [Path(runs_dir, text, "config.yaml"), Path(text, "config.yaml"), Path(text)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        error = missing_run(runs_dir, name_of(runs_dir, text), _KEY)
        reason, _, remedy = error.partition("\nremedy: ")
        reason = f"is no run and no file: {reason}"
        raise ConfigError([Problem(_KEY, value, reason, f"{remedy}; or a YAML file")])
    return path


def _dictionaries(schema: type) -> list[str]:
    """Return the keys that have names of a user's own below them, and so are one value each."""
    fields: Any = OmegaConf.structured(schema)
    nodes = {key: node_of(fields, key) for key in all_keys(fields)}
    return [
        key
        for key, node in nodes.items()
        if isinstance(node, DictConfig) and not is_dataclass(node._metadata.ref_type)
    ]


def _read(value: str, runs_dir: str, schema: type) -> dict[str, Any]:
    """Return what is taken of the run or file ``value``, with values as ``schema`` has them."""
    path = _find(value, runs_dir)
    is_run = path != Path(value.strip("'\"")) or (
        path == (run := RunDirectory(path.parent)).config and run.manifest.is_file()
    )
    fields: Any = OmegaConf.structured(TrainConfig if is_run else schema)
    try:
        content = translate(read_yaml(path))
        typed: Any = OmegaConf.merge(fields, content)
        OmegaConf.to_object(typed)
    except UnreadableError as error:
        remedy = "correct the file; modtrain config train prints one that is right"
        raise ConfigError([Problem(_KEY, value, f"{path}: {error}", remedy)]) from None
    except OmegaConfBaseException as error:
        raise_if_any(mistakes_in_file(path, fields, choices_of, _CHOOSE))
        remedy = "correct the file; modtrain config train prints one that is right"
        raise ConfigError([Problem(_KEY, value, f"{path}: {plain(error)}", remedy)]) from None
    not_taken = _OWN if is_run else ()
    raise_if_any([p for p in misread_in_file(path, typed) if p.key not in not_taken])
    taken = {key: part for key, part in content.items() if key not in not_taken}
    return _only(OmegaConf.to_container(typed), taken)


def _only(typed: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return those values of ``typed`` that ``content`` gives."""
    return {
        key: _only(typed[key], value)
        if isinstance(value, Mapping) and isinstance(typed[key], Mapping)
        else typed[key]
        for key, value in content.items()
    }
