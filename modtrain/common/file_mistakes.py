"""What a YAML file of a user's own has that a configuration does not take, and what to write."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from modtrain.common.config_keys import all_keys
from modtrain.common.errors import Problem
from modtrain.common.overrides import unknown_key
from modtrain.common.renamed_keys import new_name
from modtrain.common.spelling import misfit, node_of

# What a file below --config-dir may have at its top beside keys.
OF_HYDRA = ("defaults", "hydra")
# The tag of <<, which takes the keys of another mapping.
_MERGE = "tag:yaml.org,2002:merge"


def mistakes_in_file(
    path: Path,
    config: DictConfig,
    choices: Callable[[str], Sequence[str]],
    choose: str,
    prefix: str = "",
    others: Sequence[str] = (),
) -> list[Problem]:
    """Return a problem for each key and value of a file that ``config`` does not take.

    config: with the keys there are, and their types. choices: of a group, by its name; empty for no
    group. choose: how one is chosen, with ``{key}`` and ``{value}``. prefix: the section that the
    file's keys are below; empty for the top. others: what may stand beside keys at the top.
    """
    loader = get_yaml_loader()(path.read_text(encoding="utf-8"))
    file = _File(path, loader, config, choices, choose, others)
    return list(file.problems(loader.get_single_node(), prefix))


@dataclass(frozen=True)
class _File:
    path: Path
    loader: Any
    config: DictConfig
    choices: Callable[[str], Sequence[str]]
    choose: str
    others: Sequence[str]

    def problems(self, node: yaml.Node | None, prefix: str) -> Iterator[Problem]:
        """Yield what is wrong with the section ``prefix``, of which ``node`` gives keys."""
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        for name, child in pairs:
            if name.tag == _MERGE or (not prefix and name.value in self.others):
                continue
            key = f"{prefix}.{name.value}" if prefix else str(name.value)
            if new_name(key):
                # It is read as its new name, or refused with it.
                continue
            text, known = self._text(child), node_of(self.config, key)
            if "." in str(name.value):
                remedy = "write " + shlex.quote(f"{key}={text}")
                yield self._located(Problem(key, text, "has a dot in a key", remedy), child)
                continue
            if known is None:
                groups = [g for g in (*map(str, self.config), "experiment") if self.choices(g)]
                problem = unknown_key(key, text, self.config, groups=groups)
                yield self._located(problem, child)
            elif not _is_section(known):
                yield from self._wrong_value(key, child)
            elif isinstance(child, yaml.MappingNode):
                yield from self.problems(child, key)
            elif text in self.choices(key):
                reason = f"names a choice, and {key} is a section of keys"
                remedy = self.choose.format(key=key, value=text)
                yield self._located(Problem(key, text, reason, remedy), child)
            else:
                yield from self._wrong_value(key, child)

    def _wrong_value(self, key: str, node: yaml.Node) -> Iterator[Problem]:
        value, text = self.loader.construct_object(node, deep=True), self._text(node)
        try:
            trial = self.config.copy()
            OmegaConf.update(trial, key, value, merge=True)
            if _is_section(node_of(self.config, key)) and value is None:
                raise ValueError
        except (OmegaConfBaseException, ValueError, TypeError):
            wrong = misfit(self.config, key, value, text)
            reason, remedy = wrong or ("does not fit", "give a value of that type")
            yield self._located(Problem(key, text or "null", reason, remedy), node)

    def _located(self, problem: Problem, node: yaml.Node) -> Problem:
        """Return ``problem`` with the file and line, and a remedy that is YAML."""
        reason = f"{problem.reason}, in {self.path}, line {node.start_mark.line + 1}"
        return replace(problem, reason=reason, remedy=self._in_yaml(problem.remedy))

    def _in_yaml(self, remedy: str) -> str:
        """Return a remedy whose overrides are keys and values of a file."""
        if not remedy.startswith("write "):
            return remedy
        head, sign, tail = remedy.partition("; ")
        words = [self._word_in_yaml(word) for word in shlex.split(head)]
        return f"{' '.join(words)}{sign}{tail}"

    def _word_in_yaml(self, word: str) -> str:
        key, sign, value = word.partition("=")
        if not sign or not re.fullmatch(r"[\w.]+", key):
            return word
        if self.choices(key) and "." not in key:
            return self.choose.format(key=key, value=value)
        *sections, last = key.split(".")
        ends = "}" * len(sections)
        return "".join(f"{section}: {{" for section in sections) + f"{last}: {value}{ends}"

    def _text(self, node: yaml.Node) -> str:
        """Return a value as it is written, a list in brackets."""
        if isinstance(node, yaml.ScalarNode):
            return str(node.value)
        if isinstance(node, yaml.SequenceNode):
            return f"[{', '.join(map(self._text, node.value))}]"
        return str(self.loader.construct_object(node, deep=True))


def _is_section(node: Any) -> bool:
    return isinstance(node, DictConfig) and is_dataclass(node._metadata.object_type)


def has_section(config: DictConfig, section: str) -> bool:
    """Whether ``config`` has the section that a file's keys are below."""
    return not section or section in all_keys(config)
