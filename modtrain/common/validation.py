"""Checks for typed configurations.

Each returns the problems of the fields ``names`` of ``config``, whose keys begin with ``prefix``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from modtrain.common.errors import Problem


def key_of(prefix: str, name: str) -> str:
    """Return the dotted key of a field below ``prefix``, which may be empty."""
    return f"{prefix}.{name}" if prefix else name


def at_least(config: object, prefix: str, least: int, *names: str) -> list[Problem]:
    """Find the fields that are not finite or below ``least``; None passes."""
    return [
        Problem(key_of(prefix, name), value, f"is not {least} or more", f"give {least} or more")
        for name, value in _values(config, names)
        if value is not None and not (least <= value < math.inf)
    ]


def above_zero(config: object, prefix: str, *names: str) -> list[Problem]:
    """Find the fields that are not finite and above 0; None passes."""
    return [
        Problem(key_of(prefix, name), value, "is not above 0", "give a positive number")
        for name, value in _values(config, names)
        if value is not None and not (math.isfinite(value) and value > 0)
    ]


def not_negative(config: object, prefix: str, *names: str) -> list[Problem]:
    """Find the fields that are not finite or below 0; None passes."""
    return [
        Problem(key_of(prefix, name), value, "is not 0 or more", "give 0 or a positive number")
        for name, value in _values(config, names)
        if value is not None and not (0 <= value < math.inf)
    ]


def shares(config: object, prefix: str, *names: str) -> list[Problem]:
    """Find the fields outside [0, 1]."""
    return [
        Problem(
            key_of(prefix, name), value, "is not a share in [0, 1]", "give a number from 0 to 1"
        )
        for name, value in _values(config, names)
        if not 0 <= value <= 1
    ]


def decays(config: object, prefix: str, *names: str) -> list[Problem]:
    """Find the fields outside [0, 1): a running mean with decay 1 would never move."""
    return [
        Problem(key_of(prefix, name), value, "is not in [0, 1)", "0.9 and 0.99 are usual")
        for name, value in _values(config, names)
        if not 0 <= value < 1
    ]


def one_of(config: object, prefix: str, name: str, choices: Sequence[str]) -> list[Problem]:
    """Find a field, or an item of a list in it, that is none of ``choices``."""
    value = getattr(config, name)
    values = value if isinstance(value, list) else [value]
    remedy = f"use one of: {', '.join(choices)}"
    key = key_of(prefix, name)
    return [Problem(key, value, "is not known", remedy) for value in values if value not in choices]


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


def _values(config: object, names: Iterable[str]) -> list[tuple[str, float]]:
    return [(name, getattr(config, name)) for name in names]
