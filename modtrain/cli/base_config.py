"""``from=RUN``: the configuration of a run, or of a file, as the base of a new one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from modtrain.cli.compose import SCHEMAS, compose
from modtrain.common.errors import ConfigError, Problem, raise_if_any
from modtrain.common.overrides import SOURCES, parse, plain
from modtrain.common.reading import UnreadableError, read_yaml
from modtrain.common.renamed_keys import flatten, translate
from modtrain.common.shipped import conf_dir
from modtrain.common.yaml_texts import misread_in_file
from modtrain.experiments.sweep.jobs import as_value
from modtrain.training.config import TrainConfig
from modtrain.training.named_runs import missing_run

_KEY = "from"
# What is a new run's own.
_NOT_TAKEN = ("name", "resume", "max_time")
# What a run starts from is one choice: a new one keeps nothing of the base's.
_STARTING_POINT = ("branch", "init")


def expand_base(verb: str, words: Sequence[str], config_dir: str | None) -> list[str]:
    """Return ``words`` with the overrides that ``from=RUN`` stands for in its place.

    They come before the others, which so win. A group that is chosen beside it (``model=tiny``)
    keeps nothing of the run's; nor does another starting point (``init.run``, ``branch.run``).

    Raises:
        ConfigError: there is no such run or file; it does not fit; the verb trains nothing.
    """
    given = [word for word in words if word.partition("=")[0] == _KEY]
    if not given:
        return list(words)
    # The first word of `submit` and `config` is the verb that has the configuration.
    first = [words[0]] if verb in ("submit", "config") else []
    others = [word for word in words[len(first) :] if word not in given]
    schema = SCHEMAS.get(first[0] if first else verb, object)
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
    stored = _read(value, Path(runs_dir))
    sections = {o.key_or_group.partition(".")[0] for o in parsed}
    replaced = [*chosen, *(_STARTING_POINT if sections & {*_STARTING_POINT} else ())]
    flat = {
        key: content
        for key, content in flatten(stored, whole=[SOURCES]).items()
        if key not in _NOT_TAKEN and key.partition(".")[0] not in replaced
    }
    defaults = flatten(asdict(_default(groups, config_dir)), whole=[SOURCES])
    base = [f"{key}={as_value(v)}" for key, v in flat.items() if defaults.get(key, ...) != v]
    return [*first, *base, *others]


def _default(groups: Sequence[str], config_dir: str | None) -> TrainConfig:
    config: TrainConfig = compose("train", groups, config_dir)
    return config


def _read(value: str, runs_dir: Path) -> dict[str, Any]:
    """Return the keys of the run or file ``value``."""
    text = value.strip("'\"")
    paths = [runs_dir / text / "config.yaml", Path(text, "config.yaml"), Path(text)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        reason, _, remedy = missing_run(str(runs_dir), text, _KEY).partition("\nremedy: ")
        reason = f"is no run and no file: {reason}"
        raise ConfigError([Problem(_KEY, value, reason, f"{remedy}; or a YAML file")])
    try:
        content = translate(read_yaml(path))
        schema: Any = OmegaConf.structured(TrainConfig)
        typed: Any = OmegaConf.merge(schema, content)
        OmegaConf.to_object(typed)
        raise_if_any([p for p in misread_in_file(path, typed) if p.key not in _NOT_TAKEN])
    except (UnreadableError, OmegaConfBaseException) as error:
        remedy = "correct the file; modtrain config train prints one that is right"
        raise ConfigError([Problem(_KEY, value, f"{path}: {plain(error)}", remedy)]) from None
    return _only(OmegaConf.to_container(typed), content)


def _only(typed: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return those values of ``typed`` that ``content`` gives."""
    return {
        key: _only(typed[key], value)
        if isinstance(value, Mapping) and isinstance(typed[key], Mapping)
        else typed[key]
        for key, value in content.items()
    }
