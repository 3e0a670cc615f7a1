"""A search over finitely many points: no point is tried twice."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import optuna

from modtrain.experiments.search.config import Dimension

# Draws of Optuna's that may be points of other trials, before any other point is taken.
_MAX_DRAWS = 16
# A space of so many points is listed to find one that was not tried.
_MAX_LISTED = 2**16


def num_points(dimensions: Sequence[Dimension]) -> int | None:
    """Return how many points the space has; None where an interval is continuous."""
    sizes = [dimension.size for dimension in dimensions]
    return None if None in sizes else math.prod(size or 0 for size in sizes)


def draw_untried(
    study: optuna.Study, dimensions: Mapping[str, Dimension], seed: int
) -> dict[str, Any] | None:
    """Return the values of a finite space's next trial, by parameter; None where all were tried.

    The point is Optuna's (TPE), as long as that draws one that no trial of ``study`` has.

    dimensions: by the names of the study's parameters.
    """
    trials = study.get_trials(deepcopy=False)
    tried = {
        tuple(d.index_of(trial.params[name]) for name, d in dimensions.items())
        for trial in trials
        if dimensions.keys() <= trial.params.keys()
    }
    size = num_points(list(dimensions.values())) or 0
    if len(tried) >= size:
        return None
    for attempt in range(_MAX_DRAWS):
        sampler = optuna.samplers.TPESampler(seed=(seed + attempt * 2**16) % 2**32)
        drawn = optuna.create_study(directions=study.directions, sampler=sampler)
        drawn.add_trials(trials)
        trial = drawn.ask()
        values = {name: d.suggest(trial, name) for name, d in dimensions.items()}
        if tuple(d.index_of(values[name]) for name, d in dimensions.items()) not in tried:
            return values
    point = _any_untried(dimensions, tried, size, seed)
    return {name: d.value_at(i) for (name, d), i in zip(dimensions.items(), point, strict=True)}


def _any_untried(
    dimensions: Mapping[str, Dimension], tried: set[tuple[int, ...]], size: int, seed: int
) -> tuple[int, ...]:
    ranges = [range(d.size or 0) for d in dimensions.values()]
    generator = random.Random(seed)  # noqa: S311  (no secret)
    if size <= _MAX_LISTED:
        return generator.choice([p for p in itertools.product(*ranges) if p not in tried])
    while True:
        point = tuple(generator.choice(indices) for indices in ranges)
        if point not in tried:
            return point
