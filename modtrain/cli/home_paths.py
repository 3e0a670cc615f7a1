"""The home directory in the place of ``~`` in paths: a shell leaves it in ``key=~/x``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from modtrain.common.spelling import quoted

# The last part of every key that holds a path, or a run's name, which may be one.
_NAMES = (
    *("runs_dir", "output", "path", "data_path", "file", "input", "points", "run", "from"),
    *("sources", "cache_dir", "source", "tokenizer", "tasks"),
    # of a Slurm site
    *("image", "mounts", "scratch", "on_given_up"),
)
_HOME = r"~(?:/[^\s,\]}'\"]*)?"
_KEY = re.compile(rf"\+{{0,2}}(?:[\w.]+\.)?(?:{'|'.join(_NAMES)})")
_WHOLE = re.compile(r"(?P<quote>['\"]?)(?P<path>~(?:/.*)?)(?P=quote)")
_ITEM = re.compile(rf"(?<=[\[,:])(\s*)(['\"]?)({_HOME})\2(?=\s*[,\]}}])")


def expand_words(words: Sequence[str]) -> list[str]:
    """Return overrides with the home directory in the place of ``~`` where a key takes a path."""
    return [_expanded(word) for word in words]


def expand_config(config: Any) -> Any:
    """Put the home directory in the place of ``~`` in the paths of ``config``, and return it."""
    for field in fields(config):
        value = getattr(config, field.name)
        for part in value.values() if isinstance(value, dict) else [value]:
            if is_dataclass(part):
                expand_config(part)
        if field.name in _NAMES and isinstance(value, str):
            setattr(config, field.name, _home_for(value))
        elif field.name in _NAMES and isinstance(value, list):
            setattr(config, field.name, [_home_for(v) if isinstance(v, str) else v for v in value])
    return config


def _home_for(path: str) -> str:
    return str(Path(path).expanduser()) if re.match("~(/|$)", path) else path


def _expanded(word: str) -> str:
    key, sign, value = word.partition("=")
    if not sign or _KEY.fullmatch(key) is None:
        return word
    if whole := _WHOLE.fullmatch(value.strip()):
        return f"{key}={_home(whole['path'])}"
    if value.lstrip().startswith(("[", "{")):
        value = _ITEM.sub(lambda match: match[1] + _home(match[3]), value)
    return f"{key}={value}"


def _home(path: str) -> str:
    return quoted(str(Path(path).expanduser()))
