"""Configuration keys that have a new name.

On the command line and in a user's own YAML an old key is an error that names the new one.
Configurations that a run has stored are translated when they are read, so that runs made before a
key was renamed still resume, evaluate and generate.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from modtrain.common.errors import Problem

RENAMED_KEYS: dict[str, str] = {
    "model.router.room": "model.router.capacity_factor",
}
"""Old dotted key to new dotted key. The name of a section covers all keys below it.

An old key must not be a key of any verb's configuration today.
"""

_PACKAGE = re.compile(r"^#\s*@package\s+(\S+)", re.M)


def new_name(key: str) -> str | None:
    """Return today's name of an old dotted key, and None for a key that was not renamed."""
    head, tail = key, ""
    while head:
        if head in RENAMED_KEYS:
            return RENAMED_KEYS[head] + tail
        head, dot, last = head.rpartition(".")
        tail = f"{dot}{last}{tail}"
    return None


def renamed_problem(key: str, value: object, prefix: str = "") -> Problem | None:
    """Return what to tell a user who gave an old key; None where the key was not renamed.

    prefix: what stands before both names, as ``space.`` does in a search.
    """
    new = new_name(key)
    if new is None:
        return None
    return Problem(prefix + key, value, "was renamed", f"write {prefix}{new}")


def renamed_in_files(folder: Path) -> list[Problem]:
    """Find the old keys in all YAML files below ``folder``, which is laid out as ``conf/`` is."""
    problems = []
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder)
        text = path.read_text()
        content = yaml.safe_load(text)
        if not isinstance(content, Mapping):
            continue
        for key, value in flatten(content, section_of(name, text)).items():
            if new := new_name(key):
                problems.append(Problem(key, value, f"was renamed (in {name})", f"write {new}"))
    return problems


def section_of(name: Path, text: str) -> str:
    """Return the section that a file of Hydra's gives the keys of; empty for the top.

    name: below a directory that is laid out as ``conf/`` is. text: its content.
    """
    header = _PACKAGE.search(text)
    package = header[1] if header else "_group_"
    return {"_global_": "", "_group_": ".".join(name.parent.parts)}.get(package, package)


def translate(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested configuration ``content`` with old keys under their new names.

    ``content`` may be a part of a configuration, and is not changed.
    """
    result = copy.deepcopy(dict(content))
    for old, new in RENAMED_KEYS.items():
        value = _pop(result, old.split("."))
        if value is not _MISSING:
            _put(result, new.split("."), value)
    return result


def translate_flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by dotted key with old keys under their new names."""
    return {new_name(key) or key: value for key, value in content.items()}


def flatten(
    content: Mapping[Any, Any], prefix: str = "", whole: Collection[str] = ()
) -> dict[str, Any]:
    """Return the values of a nested configuration by dotted key, which begins with ``prefix``.

    whole: keys of sections that are one value each.
    """
    flat: dict[str, Any] = {}
    for key, value in content.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        is_section = isinstance(value, Mapping) and dotted not in whole
        flat |= flatten(value, dotted, whole) if is_section else {dotted: value}
    return flat


_MISSING = object()


def _pop(node: Any, parts: list[str]) -> Any:
    """Take a value out, and a section that is empty then."""
    head, *rest = parts
    if not isinstance(node, dict) or head not in node:
        return _MISSING
    if not rest:
        return node.pop(head)
    value = _pop(node[head], rest)
    if value is not _MISSING and not node[head]:
        del node[head]
    return value


def _put(node: dict[str, Any], parts: list[str], value: Any) -> None:
    *sections, last = parts
    for section in sections:
        node = node.setdefault(section, {})
    if isinstance(value, dict) and isinstance(node.get(last), dict):
        node[last].update(value)
    else:
        node[last] = value
