"""Checks for typed configurations.

Each returns the problems of the fields ``names`` of ``config``, whose keys begin with ``prefix``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from modtrain.common.errors import Problem
from modtrain.common.other_tools import value_here

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.I)


def key_of(prefix: str, name: str) -> str:
    """Return the dotted key of a field below ``prefix``, which may be empty."""
    return f"{prefix}.{name}" if prefix else name


def at_least(config: object, prefix: str, least: int, *names: str) -> list[Problem]:
    """Find the fields that are not finite or below ``least``; None passes."""
    wrong = f"is not {least} or more", f"give {least} or more"
    return _failing(config, prefix, names, lambda v: v is None or least <= v < math.inf, *wrong)


def above_zero(config: object, prefix: str, *names: str) -> list[Problem]:
    """Find the fields that are not finite and above 0; None passes."""
    wrong = "is not above 0", "give a positive number"
    return _failing(config, prefix, names, lambda v: v is None or 0 < v < math.inf, *wrong)


def shares(config: object, prefix: str, *names: str) -> list[Problem]:
    """Find the fields outside [0, 1]."""
    wrong = "is not a share in [0, 1]", "give a number from 0 to 1"
    return _failing(config, prefix, names, lambda v: 0 <= v <= 1, *wrong)


def decays(config: object, prefix: str, *names: str) -> list[Problem]:
    """Find the fields outside [0, 1): a running mean with decay 1 would never move."""
    wrong = "is not in [0, 1)", "0.9 and 0.99 are usual"
    return _failing(config, prefix, names, lambda v: 0 <= v < 1, *wrong)


def one_of(config: object, prefix: str, name: str, choices: Sequence[str]) -> list[Problem]:
    """Find a field, or an item of a list in it, that is none of ``choices``."""
    value = getattr(config, name)
    values = value if isinstance(value, list) else [value]
    key = key_of(prefix, name)
    return [
        Problem(key, value, "is not known", _choice_remedy(key, value, choices))
        for value in values
        if value not in choices
    ]


def no_addresses(config: object, prefix: str, *names: str) -> list[Problem]:
    """Find fields, or items of lists in them, that are addresses in place of files."""
    problems = []
    for name in names:
        value = getattr(config, name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and _ADDRESS.match(text):
                reason = "is an address, and modtrain reads files"
                file = text.rstrip("/").rpartition("/")[2] or "FILE"
                remedy = f"fetch it first, as with curl -LO {text}, and name the file: {file}"
                if not text.startswith("http"):
                    remedy = "copy it to a file first, and name that"
                problems.append(Problem(key_of(prefix, name), text, reason, remedy))
    return problems


def _choice_remedy(key: str, value: object, choices: Sequence[str]) -> str:
    remedy = f"use one of: {', '.join(choices)}"
    here = value_here(key, str(value))
    near = [here] if here in choices else difflib.get_close_matches(str(value), choices, 1)
    return f"{remedy}; did you mean {near[0]}?" if near else remedy


def broken_rules(config: object, prefix: str, *rules: tuple[bool, str, str, str]) -> list[Problem]:
    """Find the rules that are broken, each given as (is broken, field, reason, remedy)."""
    return [
        Problem(key_of(prefix, name), _shown(config, name), reason, remedy)
        for is_broken, name, reason, remedy in rules
        if is_broken
    ]


def not_empty(config: object, prefix: str, name: str, remedy: str) -> list[Problem]:
    """Find a field that is empty or None."""
    return broken_rules(config, prefix, (not getattr(config, name), name, "is empty", remedy))


def _shown(config: object, name: str) -> object:
    value = getattr(config, name)
    return "null" if value is None else value


def _failing(
    config: object, prefix: str, names: Iterable[str], passes: Callable[[Any], bool], *wrong: str
) -> list[Problem]:
    values = {name: getattr(config, name) for name in names}
    return [
        Problem(key_of(prefix, name), value, *wrong)
        for name, value in values.items()
        if not passes(value)
    ]
