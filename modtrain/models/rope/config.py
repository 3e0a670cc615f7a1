"""Configuration of a scaling of rotary positions. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, key_of, one_of

ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")


@dataclass
class RopeScalingConfig:
    """How a model's rotary positions were stretched for texts longer than it first learned from.

    name: ``none``; ``linear``: all positions divided by ``factor`` (arXiv 2306.15595); ``llama3``:
        slow angles divided, fast ones kept, a straight line between; ``yarn``: the same by number
        of turns, and sharper attention (arXiv 2309.00071).
    factor: how much longer.
    original_positions: tokens of the texts before; for ``llama3`` and ``yarn``.
    low_freq_factor, high_freq_factor: of ``llama3``: turns within ``original_positions`` below
        which an angle is divided, and above which it is kept.
    beta_fast, beta_slow: of ``yarn``: turns above which an angle is kept, below which divided.
    attention_factor: of ``yarn``, on cosine and sine; null: ``0.1 ln(factor) + 1``.
    truncate: of ``yarn``: whether the bounds are rounded to whole angles.
    """

    name: str = "none"
    factor: float = 1.0
    original_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def amplitude(self) -> float:
        """The factor on cosine and sine."""
        if self.name != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the scaling."""
        problems = one_of(self, prefix, "name", ROPE_SCALINGS)
        problems += at_least(self, prefix, 1, "original_positions")
        problems += above_zero(
            *(self, prefix, "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
            "attention_factor",
        )
        if not (math.isfinite(self.factor) and self.factor >= 1):
            remedy = "give 1 or more: the new length over the first one"
            problems.append(
                Problem(key_of(prefix, "factor"), self.factor, "is not 1 or more", remedy)
            )
        if self.name in ("llama3", "yarn") and self.original_positions is None:
            reason = f"is missing: {self.name} counts an angle's turns in them"
            remedy = "give the tokens of the texts that the model first learned from"
            problems.append(Problem(key_of(prefix, "original_positions"), "null", reason, remedy))
        for low, high, name in (
            ("low_freq_factor", "high_freq_factor", "llama3"),
            ("beta_slow", "beta_fast", "yarn"),
        ):
            bound, value = getattr(self, low), getattr(self, high)
            if self.name == name and value <= bound:
                reason = f"is not above {key_of(prefix, low)}={bound}"
                problems.append(Problem(key_of(prefix, high), value, reason, "give more"))
        return problems
