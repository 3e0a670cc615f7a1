"""How a next token is chosen, as typed configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, key_of, shares


@dataclass
class SamplingConfig:
    """How a next token is chosen; the settings act in the order given here.

    The conventions are those of Hugging Face's ``generate``.

    repetition_penalty: logits of tokens that the text already has are divided by it where they are
        positive, multiplied where negative (arXiv 1909.05858, section 4.1); 1: none.
    greedy: the likeliest token; nothing below matters then.
    temperature: what logits are divided by.
    top_k: only tokens whose logit is not below the k-th largest; null: all.
    top_p: the fewest tokens, the likeliest first, that hold this much probability
        (arXiv 1904.09751); null: all.
    min_p: only tokens with this share of the likeliest one's probability (arXiv 2407.01082);
        null: all.
    seed: of the draws; any integer.
    """

    repetition_penalty: float = 1.0
    greedy: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def problems(self, prefix: str = "") -> list[Problem]:
        """Everything wrong with the settings."""
        found = [
            *above_zero(self, prefix, "repetition_penalty"),
            *at_least(self, prefix, 1, "top_k"),
            *(shares(self, prefix, "min_p") if self.min_p is not None else []),
        ]
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            greedy = key_of(prefix, "greedy")
            remedy = f"give a positive number, or {greedy}=true for the likeliest token"
            key = key_of(prefix, "temperature")
            found.append(Problem(key, self.temperature, "is not above 0", remedy))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            remedy = "give a number above 0, up to 1; null takes all tokens"
            found.append(Problem(key_of(prefix, "top_p"), self.top_p, "is not in (0, 1]", remedy))
        return found
