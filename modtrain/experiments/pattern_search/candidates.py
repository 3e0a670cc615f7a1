"""The candidates of a search: given patterns, and drawn ones.

A draw is a point of a scrambled Sobol sequence, which fills the space more evenly than independent
draws. Its first coordinate says how many forward FLOPs the pattern should have, the others its
form. Uniform capacities of many layers would nearly all have the same sum of FLOPs, and the ends of
the front would stay empty; so each draw is tilted until it has its FLOPs: a coordinate u becomes
u^tilt, which lowers or raises all capacities and keeps their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import numpy as np
import numpy.typing as npt
from scipy.stats import qmc

from modtrain.common.errors import ConfigError, Problem
from modtrain.experiments.pattern_search.config import PARAMETRIZATIONS, PatternSearchConfig
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import RouterConfig
from modtrain.models.depth.pattern import layer_capacities, num_chosen
from modtrain.models.flops import forward_flops

Coordinates = npt.NDArray[np.float64]
# Draws in a row that give no new pattern before a parametrization counts as exhausted.
_MOST_MISSES = 256
# Bisection of log2(tilt): from almost dense to almost all layers at their lowest.
_WIDEST_TILT, _BISECTIONS = 8.0, 20


@dataclass(frozen=True)
class Candidate:
    """A pattern of the search.

    origin: its parametrization, or the pattern that was given. capacities: one a layer, whole
    tokens of a sequence; 1 is a dense layer. flops_over_dense: forward FLOPs over the dense
    model's.
    """

    name: str
    origin: str
    capacities: tuple[float, ...]
    flops_over_dense: float

    def apply(self, model: ModelConfig) -> ModelConfig:
        """Return the model with this pattern."""
        return replace(model, pattern=list(self.capacities))


class PatternSpace:
    """The patterns of one model at one sequence length.

    model: with its vocabulary. seq_len: tokens a sequence.
    """

    def __init__(self, model: ModelConfig, seq_len: int) -> None:
        self.model, self.seq_len = model, seq_len
        dense = replace(model, pattern="dense", router=RouterConfig())
        self.dense_flops = forward_flops(dense, seq_len).total

    def to_tokens(self, capacities: Sequence[float | None]) -> tuple[float, ...]:
        """Return the capacities rounded to whole tokens of a sequence; None, dense, is 1."""
        shares = (
            1.0 if c is None else num_chosen(c, self.seq_len) / self.seq_len for c in capacities
        )
        return tuple(shares)

    def flops_over_dense(self, capacities: Sequence[float]) -> float:
        """Return the forward FLOPs of a pattern, executed, over those of the dense model."""
        model = replace(self.model, pattern=list(capacities))
        return forward_flops(model, self.seq_len).total / self.dense_flops

    def is_valid(self, capacities: Sequence[float]) -> bool:
        """Whether a layer is routed, and the model takes the pattern."""
        is_dense = all(capacity == 1 for capacity in capacities)
        return not is_dense and not replace(self.model, pattern=list(capacities)).problems()


def find_candidates(
    config: PatternSearchConfig, space: PatternSpace
) -> tuple[list[Candidate], list[str]]:
    """Return the given candidates and the drawn ones, and what a reader should know of them.

    The same configuration gives the same candidates, under the same names; the first ones do not
    depend on ``num_drawn``.

    Raises:
        ConfigError: there are fewer patterns between the limits than are to be drawn, or none.
    """
    candidates: dict[tuple[float, ...], Candidate] = {}
    notes: list[str] = []
    for pattern in config.patterns:
        model = space.model
        capacities = space.to_tokens(layer_capacities(pattern, model.capacity, model.num_layers))
        reason = _add(config, space, candidates, str(pattern), capacities)
        notes += [f"{pattern} is left out: it {reason}"] if reason else []
    sources = [_Source(config, space, name) for name in config.parametrizations]
    num_wanted = len(candidates) + config.num_drawn
    for source in cycle(sources):
        if len(candidates) >= num_wanted or all(source.is_exhausted for source in sources):
            break
        source.add_one(candidates)
    for source in sources:
        if source.is_exhausted:
            notes.append(f"{source.name} has no more patterns between the limits")
    if len(candidates) < num_wanted or not candidates:
        raise ConfigError([_too_few(config, space, len(candidates))])
    return list(candidates.values()), notes


def _too_few(config: PatternSearchConfig, space: PatternSpace, num_wanted: int) -> Problem:
    lowest = space.flops_over_dense([1 / space.seq_len] * space.model.num_layers)
    reason = (
        f"is more than there are: {num_wanted} patterns have {config.flops_min:g} to"
        f" {config.flops_max:g} of the dense model's forward FLOPs, of which"
        f" {lowest:.3g} is the least, one token a layer"
    )
    remedy = "draw fewer, widen flops_min to flops_max, or give more levels or parametrizations"
    return Problem("num_drawn", config.num_drawn, reason, remedy)


def _add(
    config: PatternSearchConfig,
    space: PatternSpace,
    candidates: dict[tuple[float, ...], Candidate],
    origin: str,
    capacities: tuple[float, ...],
) -> str:
    """Add a pattern, or return why it is no candidate."""
    if capacities in candidates:
        return f"is the same as {candidates[capacities].origin}"
    flops = space.flops_over_dense(capacities)
    if not config.flops_min <= flops <= config.flops_max:
        limits = f"not {config.flops_min:g} to {config.flops_max:g}"
        return f"has {flops:.3g} of the dense model's forward FLOPs, {limits}"
    if not space.is_valid(capacities):
        return "is no pattern of this model with a routed layer"
    candidates[capacities] = Candidate(f"c{len(candidates):03d}", origin, capacities, flops)
    return ""


class _Source:
    """The draws of one parametrization."""

    def __init__(self, config: PatternSearchConfig, space: PatternSpace, name: str) -> None:
        self.config, self.space, self.name = config, space, name
        self.parametrization = Parametrization(config, name, space.model.num_layers)
        self.is_exhausted = False
        # Of its own, so that the draws do not depend on which others there are.
        rng = np.random.default_rng([config.sampler_seed, PARAMETRIZATIONS.index(name)])
        self._engine = qmc.Sobol(1 + self.parametrization.num_coordinates, rng=rng)

    def add_one(self, candidates: dict[tuple[float, ...], Candidate]) -> None:
        """Draw until there is a new candidate, or no more is likely."""
        if self.is_exhausted:
            return
        for capacities in self._draws():
            if not _add(self.config, self.space, candidates, self.name, capacities):
                return
        self.is_exhausted = True

    def _draws(self) -> Iterator[tuple[float, ...]]:
        for _ in range(_MOST_MISSES):
            share, *rest = self._engine.random()[0]
            coordinates = np.asarray(rest)
            low = max(self.config.flops_min, self._flops(coordinates, _WIDEST_TILT))
            target = low + share * max(0.0, self.config.flops_max - low)
            yield self._tilted_to(coordinates, target)

    def _tilted_to(self, coordinates: Coordinates, target: float) -> tuple[float, ...]:
        """Return the draw with the largest FLOPs up to ``target`` that a tilt gives."""
        low, high = -_WIDEST_TILT, _WIDEST_TILT
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if self._flops(coordinates, middle) > target:
                low = middle
            else:
                high = middle
        return self._capacities(coordinates, high)

    def _capacities(self, coordinates: Coordinates, log_tilt: float) -> tuple[float, ...]:
        tilt = math.exp2(log_tilt)
        return self.space.to_tokens(self.parametrization.capacities(coordinates, tilt).tolist())

    def _flops(self, coordinates: Coordinates, log_tilt: float) -> float:
        return self.space.flops_over_dense(self._capacities(coordinates, log_tilt))


class Parametrization:
    """From coordinates in [0, 1) to capacities in (0, 1], one a layer, before rounding."""

    def __init__(self, config: PatternSearchConfig, name: str, num_layers: int) -> None:
        self.config, self.name, self.num_layers = config, name, num_layers
        self._levels = np.unique(config.levels)

    @property
    def num_coordinates(self) -> int:
        """How many coordinates a pattern has; the first of ``monotone`` is its direction."""
        return {
            "free": self.num_layers,
            "monotone": self.config.knots + 1,
            "symmetric": self.config.knots,
        }[self.name]

    def capacities(self, coordinates: Coordinates, tilt: float) -> Coordinates:
        """Return the capacities. tilt: above 0; the larger, the lower is every capacity."""
        if self.name == "free":
            index = np.floor(coordinates**tilt * len(self._levels)).astype(int)
            levels: Coordinates = self._levels[np.minimum(index, len(self._levels) - 1)]
            return levels
        if self.name == "symmetric":
            half = self._interpolated(
                self._knots(coordinates, tilt), math.ceil(self.num_layers / 2)
            )
            layers = np.arange(self.num_layers)
            result: Coordinates = half[np.minimum(layers, layers[::-1])]
            return result
        rising = np.sort(self._knots(coordinates[1:], tilt))
        is_rising = coordinates[0] >= 0.5
        return self._interpolated(rising if is_rising else rising[::-1], self.num_layers)

    def _knots(self, coordinates: Coordinates, tilt: float) -> Coordinates:
        graded = 1 - self.config.dense_share
        # From capacity_min at 0 to 1 where the dense share begins.
        share = np.minimum(coordinates**tilt / graded, 1.0) if graded else np.ones_like(coordinates)
        result: Coordinates = self.config.capacity_min ** (1 - share)
        return result

    def _interpolated(self, knots: Coordinates, num_layers: int) -> Coordinates:
        result: Coordinates = np.interp(
            np.linspace(0, 1, num_layers), np.linspace(0, 1, len(knots)), knots
        )
        return result
