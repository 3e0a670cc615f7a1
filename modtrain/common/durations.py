"""Durations as people write them: ``30m``, ``1h30m``, ``00:30:00``."""

from __future__ import annotations

import re

from modtrain.common.errors import Problem

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_WITH_UNITS = re.compile(r"(?:([0-9]+)d)?(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?")
# Of Lightning's Trainer, whose days end with a colon, and of Slurm, whose end with a dash.
_CLOCK = re.compile(r"(?:([0-9]+)[:-])?([0-9]+):([0-9]{2}):([0-9]{2})")
EXAMPLES = "30m, 1h30m, 2d or 00:30:00"


def seconds_of(text: str) -> int | None:
    """Return the seconds of a duration above zero, None for what is none.

    Units are d, h, m and s, in this order; a clock is hours:minutes:seconds, with days before it.
    """
    match = _WITH_UNITS.fullmatch(text) or _CLOCK.fullmatch(text)
    if match is None:
        return None
    counts = [int(count or 0) for count in match.groups()]
    return sum(n * unit for n, unit in zip(counts, _UNITS.values(), strict=True)) or None


def duration_problems(key: str, text: str) -> list[Problem]:
    """Find what is no duration."""
    if seconds_of(text) is not None:
        return []
    if text.isdecimal() and int(text):
        return [Problem(key, text, "has no unit", f"write {text}s, or {text}m for minutes")]
    return [Problem(key, text, "is no duration", f"write {EXAMPLES}")]
