"""What the YAML files of a user's task folder would run, found without running it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modtrain.common.errors import DataError
from modtrain.common.reading import MAX_YAML_BYTES, UnreadableError, read_bytes

FUNCTION_TAG = "!function"
# What reads data from files as data; others, such as pandas for pickles, can run code.
DATA_READERS = ("json", "csv", "text", "parquet", "arrow")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MAX_DEPTH = 20
_PLAIN_TAGS = tuple(
    f"tag:yaml.org,2002:{name}"
    for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge")
)


@dataclass
class TaskFile:
    """What a YAML file of a task, and the files that it includes, name.

    functions: Python functions. readers: what reads data, where it is not known to be harmless.
    metrics: names of metrics. members: names of tasks, of a group.
    """

    functions: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    members: list[str] = field(default_factory=list)


def read_task_file(path: Path) -> TaskFile:
    """Return what the file at ``path`` names, with what it includes.

    Raises:
        DataError: a file cannot be read as YAML.
    """
    named, waiting, seen = TaskFile(), [path.resolve()], set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for node in _nodes(_compose(current)):
            if node.tag == FUNCTION_TAG:
                named.functions.append(f"{current.name}: {node.value}")
            elif node.tag not in _PLAIN_TAGS:
                raise DataError(f"{current}: has {node.tag}, which is no plain YAML")
            if isinstance(node, yaml.MappingNode):
                waiting += [current.parent / include for include in _values(node, "include")]
                _note(named, node)
    return named


def _note(named: TaskFile, node: yaml.MappingNode) -> None:
    """Note what a mapping of a task or a group names."""
    named.metrics += _values(node, "metric")
    named.members += [*_values(node, "task"), *_values(node, "group")]
    # A dataset of the hub is OWNER/NAME, and has no code.
    named.readers += [
        reader
        for reader in _values(node, "dataset_path")
        if reader not in DATA_READERS and "/" not in reader
    ]
    if "true" in map(str.lower, _values(node, "hf_evaluate")):
        named.metrics.append("hf_evaluate: true")


def _compose(path: Path) -> yaml.Node:
    try:
        content = read_bytes(path, MAX_YAML_BYTES)
        depth = 0
        # Deep nesting crashes the composer.
        for event in yaml.parse(content, _LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise UnreadableError(f"{path.name} is nested too deeply")
        node = yaml.compose(content, _LOADER)
    except (yaml.YAMLError, ValueError) as error:
        raise DataError(f"{path}: is no YAML: {' '.join(str(error).split())[:200]}") from None
    except UnreadableError as error:
        raise DataError(f"{path.parent}/{error}") from None
    if node is None:
        raise DataError(f"{path}: is empty")
    return node


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """Yield every node once, whatever aliases lead to it."""
    waiting, seen = [root], {id(root)}
    while waiting:
        node = waiting.pop()
        yield node
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        for child in children:
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)


def _values(node: yaml.MappingNode, key: str) -> list[str]:
    """Return the text, or the texts in the list, under ``key``."""
    values = [value for name, value in node.value if name.value == key]
    scalars = [
        item
        for value in values
        for item in (value.value if isinstance(value, yaml.SequenceNode) else [value])
    ]
    return [item.value for item in scalars if isinstance(item, yaml.ScalarNode)]
