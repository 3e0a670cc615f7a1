"""The keys of a composed configuration: which there are, which do not belong, which is meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass

from omegaconf import DictConfig

# How alike names in the same section, or in any, are at least: the ratio of `difflib`.
_ALIKE_BESIDE, _ALIKE_ANYWHERE = 0.6, 0.8


def all_keys(node: DictConfig, prefix: str = "") -> list[str]:
    """Return the dotted keys of ``node``, sections included."""
    return [key for key, _ in _nodes(node, prefix)]


def added_keys(config: DictConfig) -> list[str]:
    """Return the dotted keys that stand beside the fields of a dataclass, of which they are none.

    OmegaConf takes such a key where an override has a plus, and nothing ever reads it.
    """
    sections = [("", config), *((f"{key}.", child) for key, child in _nodes(config))]
    return [
        f"{prefix}{name!s}"
        for prefix, section in sections
        if isinstance(section, DictConfig) and is_dataclass(kind := section._metadata.object_type)
        for name in section
        if name not in {field.name for field in fields(kind)}
    ]


def nearest_keys(key: str, known: Iterable[str]) -> list[str]:
    """Return the keys of ``known`` that a misspelt ``key`` may mean, the likeliest first.

    These are the keys of that name in other sections, or else the most similar one: of the same
    section, or of any.
    """
    known = list(known)
    section, _, name = key.rpartition(".")
    name = name.replace("-", "_").casefold()
    same = [other for other in known if _name(other) == name]
    if same:
        same.sort(key=lambda other: (-_alike(_section(other), section), len(other)))
        return same[:1] if _alike(_section(same[0]), section) > _ALIKE_ANYWHERE else same[:3]
    likeness = {other: _alike(_name(other), name) for other in known}
    near = [
        other
        for other, alike in likeness.items()
        if alike > (_ALIKE_BESIDE if _section(other) == section else _ALIKE_ANYWHERE)
    ]
    return [max(near, key=lambda other: likeness[other])] if near else []


def keys_beside(key: str, known: Iterable[str]) -> tuple[str, list[str]]:
    """Return the innermost section of ``key`` that exists, empty for the top, and its keys."""
    known = list(known)
    section = _section(key)
    while section and section not in known:
        section = _section(section)
    return section, [_name(other) for other in known if _section(other) == section]


def _alike(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _section(key: str) -> str:
    return key.rpartition(".")[0]


def _nodes(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key in node:
        full, child = f"{prefix}{key!s}", node._get_node(key)
        yield full, child
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _nodes(child, f"{full}.")
