"""Which layers are routed, and at which capacity."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from modtrain.common.errors import Problem


def _u_shape(layer: int, last: int) -> float:
    # With an even number of layers the middle two are the lowest, exactly at the capacity.
    bottom = last % 2
    return ((2 * layer - last) ** 2 - bottom) / (last**2 - bottom) if last > 1 else 1.0


# How far each layer is from the capacity (0) towards all the tokens (1).
_GRADED: dict[str, Callable[[int, int], float]] = {
    "cosine": lambda layer, last: (1 + math.cos(math.pi * layer / last)) / 2,
    "u_shape": _u_shape,
    "ramp_down": lambda layer, last: (last - layer) / last,
    "ramp_up": lambda layer, last: layer / last,
}
PATTERNS = ("dense", "every", "every_other", "all_but_ends", *_GRADED)
# At most four digits of repetition: a typing error must not exhaust the memory. A space matches in
# one place only, or a long text with an error at its end would be tried in 2^n ways.
_LIST_TERM = r"\s*\[([^\[\]]*)\]\s*(?:\*\s*(\d{1,4})\s*)?"


def num_chosen(capacity: float, seq_len: int) -> int:
    """How many of ``seq_len`` tokens a block of this capacity takes: k = max(1, round(c S))."""
    return max(1, round(capacity * seq_len))


def layer_capacities(
    pattern: str | Sequence[float], capacity: float, num_layers: int
) -> list[float | None]:
    """Return the capacity of each layer, None for a dense one.

    ``every_other`` routes the layers 1, 3, 5, … counted from 0, so that the first block, which
    builds the features that routers score, is dense. ``all_but_ends`` leaves the first and the last
    layer dense. The graded patterns lie between 1 and ``capacity``: ``cosine`` falls along half a
    cosine (after the progressive ratio decay of p-MoD, arXiv 2412.04449), ``ramp_down`` falls and
    ``ramp_up`` rises linearly, ``u_shape`` is a parabola with 1 at both ends; a single layer is at
    ``capacity``. In these and in a list a 1 is a dense layer.

    Raises:
        ValueError: the pattern is neither a known name nor a list of numbers.
    """
    if pattern == "dense":
        return [None] * num_layers
    if pattern == "every":
        return [capacity] * num_layers
    if pattern == "every_other":
        return [capacity if layer % 2 else None for layer in range(num_layers)]
    if pattern == "all_but_ends":
        return [capacity if 0 < layer < num_layers - 1 else None for layer in range(num_layers)]
    graded = _GRADED.get(pattern) if isinstance(pattern, str) else None
    values = _as_list(pattern) if graded is None else _values(graded, capacity, num_layers)
    return [None if value == 1 else value for value in values]


def pattern_problems(
    pattern: object, capacity: float, num_layers: int, prefix: str
) -> list[Problem]:
    """Everything wrong with a pattern and its capacity."""
    problems = []
    if not 0 < capacity <= 1:
        problems.append(
            Problem(
                f"{prefix}.capacity",
                capacity,
                "is not a share of the tokens in (0, 1]",
                f"try 0.125, the paper's best; for no routing set {prefix}.pattern=dense",
            )
        )
    key = f"{prefix}.pattern"
    if isinstance(pattern, str) and pattern in PATTERNS:
        if pattern in _GRADED and capacity == 1:
            reason = f"routes nothing: it grades between 1 and {prefix}.capacity=1"
            remedy = f"lower {prefix}.capacity, or use the pattern every"
            return [*problems, Problem(key, pattern, reason, remedy)]
        return problems + _too_few_layers(pattern, num_layers, key)
    try:
        values = _as_list(pattern)
    except ValueError as error:
        names = ", ".join(PATTERNS)
        example = f"[1, .125]*{num_layers // 2}" + (" + [1]" if num_layers % 2 else "")
        remedy = f"use one of: {names}; or a list of capacities: '{key}=\"{example}\"'"
        return [*problems, Problem(key, pattern, str(error), remedy)]
    if len(values) != num_layers:
        problems.append(
            Problem(
                key,
                pattern,
                f"names {len(values)} layers, but {prefix}.num_layers={num_layers}",
                f"give one capacity per layer; '{key}=\"[1, .125]*6\"' repeats a list",
            )
        )
    bad = [value for value in values if not 0 < value <= 1]
    if bad:
        reason, remedy = f"has {bad[0]}, not in (0, 1]", "1 is a dense layer, 0.125 k=S/8"
        problems.append(Problem(key, pattern, reason, remedy))
    return problems


def _too_few_layers(pattern: str, num_layers: int, key: str) -> list[Problem]:
    """Check for a pattern that leaves no layer between its dense ends."""
    if pattern not in ("all_but_ends", "u_shape") or num_layers not in (1, 2):
        return []
    if any(share is not None for share in layer_capacities(pattern, 0.5, num_layers)):
        return []
    reason = f"routes nothing: num_layers={num_layers} leaves no layer between the dense ends"
    return [Problem(key, pattern, reason, "use 3 layers or more, or the pattern every")]


def _values(graded: Callable[[int, int], float], capacity: float, num_layers: int) -> list[float]:
    last = num_layers - 1
    if last < 1:
        return [capacity] * num_layers
    # In this form the ends are exactly 1 and the capacity.
    return [capacity + (1 - capacity) * graded(layer, last) for layer in range(num_layers)]


def _as_list(pattern: object) -> list[float]:
    if isinstance(pattern, str):
        return _parse(pattern)
    if not isinstance(pattern, Sequence):
        raise ValueError("is neither a pattern's name nor a list")
    for value in pattern:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"has {value!r}, which is not a number")
    try:
        return [float(value) for value in pattern]
    except OverflowError:
        raise ValueError("has a number too large for a float") from None


def _parse(text: str) -> list[float]:
    """Read ``[1, .125]*6``, and sums of such lists: ``[1]*2 + [.5, .125]*3``."""
    if not re.fullmatch(rf"{_LIST_TERM}(?:\+{_LIST_TERM})*", text):
        raise ValueError("is neither a pattern's name nor a list of capacities")
    values: list[float] = []
    for numbers, times in re.findall(_LIST_TERM, text):
        values += [float(item) for item in numbers.split(",")] * int(times or 1)
    return values
