"""Texts in YAML files that YAML takes for numbers or truth values: ``name: 2026_11_28``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

from modtrain.common.errors import Problem
from modtrain.common.renamed_keys import section_of
from modtrain.common.spelling import kind_of, quoted


def misread_in_folder(folder: Path, config: DictConfig) -> list[Problem]:
    """Return the problems of texts of ``config`` that files in ``folder`` give, and YAML changes.

    folder: laid out as ``conf/`` is: a file belongs to the section that its folder names.
    """
    problems = []
    for path in sorted(folder.rglob("*.yaml")):
        with suppress(yaml.YAMLError, OSError, UnicodeDecodeError):
            section = section_of(path.relative_to(folder), path.read_text(encoding="utf-8"))
            problems += misread_in_file(path, config, section)
    return problems


def misread_in_file(path: Path, config: DictConfig, prefix: str = "") -> list[Problem]:
    """Return the problems of the texts in a file whose keys are below ``prefix``."""
    loader = get_yaml_loader()(path.read_text(encoding="utf-8"))
    root = loader.get_single_node()
    problems = []
    for key, node in _scalars(root, prefix):
        if kind_of(config, key) is not str or node.tag == "tag:yaml.org,2002:str":
            continue
        value = loader.construct_object(node)
        is_taken = value is not None and OmegaConf.select(config, key) == str(value)
        if is_taken and str(value) != node.value:
            line = node.start_mark.line + 1
            reason = f"would be read as {value}, in {path}, line {line}"
            remedy = f"put it in quotes there: {key.rpartition('.')[2]}: {quoted(node.value)}"
            problems.append(Problem(key, node.value, reason, remedy))
    return problems


def _scalars(node: yaml.Node | None, key: str) -> Iterator[tuple[str, yaml.ScalarNode]]:
    if isinstance(node, yaml.ScalarNode):
        yield key, node
    elif isinstance(node, yaml.MappingNode):
        for name, child in node.value:
            yield from _scalars(child, f"{key}.{name.value}" if key else str(name.value))
