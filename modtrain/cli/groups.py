"""The groups of each verb with their choices, read from ``conf/``. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from modtrain.common.shipped import conf_dir


def groups_of(verb: str, user_dir: Path | None = None) -> dict[str, list[str]]:
    """Return the groups of a verb with their choices, the default first where there is one.

    user_dir: a directory of the user's own YAML.
    """
    folders = [conf_dir(), *([user_dir] if user_dir is not None else [])]
    groups: dict[str, list[str]] = {}
    for group, default in _defaults(conf_dir() / f"{verb}.yaml"):
        names = sorted({path.stem for f in folders for path in (f / group).glob("*.yaml")})
        chosen = [default] if default in names else []
        groups[group] = [*chosen, *(name for name in names if name not in chosen)]
    return groups


def _defaults(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        return
    for entry in yaml.safe_load(path.read_text()).get("defaults", []):
        if isinstance(entry, dict):
            for group, default in entry.items():
                yield group.removeprefix("optional ").strip(), default
        elif not entry.startswith("_") and not entry.endswith("_schema"):
            yield from _defaults(path.with_name(f"{entry}.yaml"))
