"""Configuration of a mixture of sources."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, key_of, not_empty
from modtrain.data.mixture.shares import SMALLEST_SHARE, units_of
from modtrain.data.remote.urls import url_problems

WHEN_EXHAUSTED = ("error", "redistribute")
# It becomes part of the names of metrics and overrides.
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass
class SourceConfig:
    """One source of a mixture.

    path: directory that ``modtrain prepare`` wrote, or its URL.
    weight: its part of the samples, over the sum of all weights; 0 until a stage gives it more.
    max_epochs: how often all of it may be read over the run; null: without limit.
    """

    path: str = ""
    weight: float = 1.0
    max_epochs: float | None = None

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with this source that can be seen without its shards."""
        return [
            *not_empty(self, prefix, "path", "name a directory that modtrain prepare wrote"),
            *url_problems(self, prefix, "path"),
            *above_zero(self, prefix, "max_epochs"),
        ]


@dataclass
class MixtureStageConfig:
    """A part of the run with weights of its own, up to the next stage or the run's end.

    begin: share of the run's tokens at which it begins.
    tokens: the same as a number of tokens; give one of the two.
    weights: weight of each source; one that is not named is not read.
    """

    begin: float | None = None
    tokens: float | None = None
    weights: dict[str, float] = field(default_factory=dict)

    def problems(self, prefix: str, sources: Mapping[str, SourceConfig]) -> list[Problem]:
        """Everything wrong with this stage of a mixture of ``sources``."""
        problems = above_zero(self, prefix, "tokens")
        if (self.begin is None) == (self.tokens is None):
            given, remedy = f"begin={self.begin}, tokens={self.tokens}", "give one of the two"
            problems.append(Problem(prefix, given, "has not one beginning", remedy))
        if self.begin is not None and not 0 < self.begin < 1:
            reason, remedy = "is not between 0 and 1", "try 0.9, or give tokens"
            problems.append(Problem(key_of(prefix, "begin"), self.begin, reason, remedy))
        key = key_of(prefix, "weights")
        for name in sorted(self.weights.keys() - sources.keys()):
            remedy = f"there are: {', '.join(sorted(sources))}"
            problems.append(Problem(key, name, "is none of data.sources", remedy))
        return problems + weight_problems(key, self.weights)


def mixture_problems(
    prefix: str, sources: Mapping[str, SourceConfig], stages: list[MixtureStageConfig]
) -> list[Problem]:
    """Everything wrong with a mixture that can be seen without the shards."""
    if not sources:
        reason, remedy = "is given without data.sources", "name the sources, or leave it out"
        key = key_of(prefix, "stages")
        return [Problem(key, len(stages), reason, remedy)] if stages else []
    problems = []
    for name, source in sources.items():
        key = key_of(prefix, f"sources.{name}")
        if not _NAME.fullmatch(name):
            reason, remedy = "is no name for a source", "use letters, digits, - and _"
            problems.append(Problem(key_of(prefix, "sources"), name, reason, remedy))
        problems += source.problems(key)
    weights = {name: source.weight for name, source in sources.items()}
    problems += weight_problems(key_of(prefix, "sources"), weights)
    for number, stage in enumerate(stages):
        problems += stage.problems(key_of(prefix, f"stages[{number}]"), sources)
    return problems


def weight_problems(key: str, weights: Mapping[str, float]) -> list[Problem]:
    """Find weights that no shares of samples follow from."""
    wrong = {name: w for name, w in weights.items() if not 0 <= w < math.inf}
    if wrong:
        return [
            Problem(key, f"{name}: {weight}", "is not a weight", "give 0 or a positive number")
            for name, weight in wrong.items()
        ]
    if not any(weights.values()):
        reason, remedy = "has no weight above 0", "give one source a weight at least"
        return [Problem(key, dict(weights) or "{}", reason, remedy)]
    units = units_of(list(weights.values()))
    reason = f"is less than {SMALLEST_SHARE} of all the weights, the smallest share there is"
    return [
        Problem(key, f"{name}: {weight}", reason, "give more, or 0")
        for (name, weight), unit in zip(weights.items(), units, strict=True)
        if weight and not unit
    ]
