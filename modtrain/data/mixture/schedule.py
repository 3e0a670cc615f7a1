"""The segments of a mixture's stream: from which position on which shares hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from modtrain.common.errors import ConfigError, Problem
from modtrain.data.mixture.config import MixtureStageConfig, SourceConfig
from modtrain.data.mixture.shares import BLOCK, Shares, units_of


@dataclass(frozen=True)
class Segment:
    """A part of the stream in which the shares stay as they are.

    start: its first position, a multiple of `BLOCK`. stage: 0 before the first stage that is
    configured, 1 in it, and so on. first: index in each source of the first sample that it reads.
    """

    start: int
    stage: int = field(compare=False)
    shares: Shares
    first: tuple[int, ...]

    def indexes_at(self, position: int) -> tuple[int, ...]:
        """The index that each source has come to at ``position``, a multiple of `BLOCK`."""
        num_blocks = (position - self.start) // BLOCK
        counts = (self.shares.samples_in(s, num_blocks) for s in range(len(self.first)))
        return tuple(had + more for had, more in zip(self.first, counts, strict=True))


@dataclass(frozen=True)
class MixtureSchedule:
    """All segments of a mixture, in order; the last one has no end unless ``end`` is one.

    names: of the sources, sorted. end: position behind the last sample that the sources' epochs
    suffice for; None: there is always one more.
    """

    names: tuple[str, ...]
    segments: tuple[Segment, ...]
    end: int | None

    def before(self, position: int) -> tuple[Segment, ...]:
        """The segments that say what stands before ``position``."""
        return tuple(segment for segment in self.segments if segment.start < position)


def make_schedule(
    sources: Mapping[str, SourceConfig],
    stages: Sequence[MixtureStageConfig],
    when_exhausted: str,
    num_samples: Mapping[str, int],
    run_samples: int,
    seq_len: int,
) -> MixtureSchedule:
    """Plan the segments of a mixture without a problem.

    num_samples: of each source, in one epoch. run_samples: that the run reads in all; stages that
    begin at a share of the run depend on it. seq_len: tokens of a sample.

    Raises:
        ConfigError: the stages are not in order, or a source that is to be read is empty.
    """
    names = tuple(sorted(sources))
    weights = [[sources[name].weight for name in names]]
    weights += [[stage.weights.get(name, 0.0) for name in names] for stage in stages]
    starts = _starts(stages, run_samples, seq_len)
    empty = [n for s, n in enumerate(names) if not num_samples[n] and any(w[s] for w in weights)]
    if empty:
        reason, remedy = "has no sample of the train split", "prepare more, or leave it out"
        raise ConfigError([Problem(f"data.sources.{n}", n, reason, remedy) for n in empty])
    limits: list[int | None] = [None] * len(names)
    if when_exhausted == "redistribute":
        limits = [epoch_limit(sources[name], num_samples[name]) for name in names]
    segments: list[Segment] = []
    first = (0,) * len(names)
    for stage, stage_weights in enumerate(weights):
        stop = starts[stage + 1] if stage + 1 < len(starts) else None
        more, end, first = _segments(stage, (starts[stage], stop), stage_weights, first, limits)
        segments += more
        if end != stop:
            return MixtureSchedule(names, tuple(segments), end)
    return MixtureSchedule(names, tuple(segments), None)


def epoch_limit(source: SourceConfig, num_samples: int) -> int | None:
    """How many samples of a source may be read over the run; None: without limit."""
    if source.max_epochs is None:
        return None
    return math.floor(Fraction(source.max_epochs) * num_samples)


def _starts(stages: Sequence[MixtureStageConfig], run_samples: int, seq_len: int) -> list[int]:
    """The positions at which the stages begin, each at the next block, with 0 before them."""
    starts, problems = [0], []
    for number, stage in enumerate(stages):
        if stage.begin is not None:
            key, value = "begin", stage.begin
            sample = Fraction(value) * run_samples
        else:
            key, value = "tokens", stage.tokens or 0.0
            sample = Fraction(value) / seq_len
        start = math.ceil(sample / BLOCK) * BLOCK
        if start <= starts[-1]:
            reason = f"begins at sample {start}, and the stage before it at {starts[-1]}"
            remedy = f"let it begin later; a stage begins at a multiple of {BLOCK} samples"
            problems.append(Problem(f"data.stages[{number}].{key}", value, reason, remedy))
        starts.append(start)
    if problems:
        raise ConfigError(problems)
    return starts


def _segments(
    stage: int,
    interval: tuple[int, int | None],
    weights: Sequence[float],
    first: tuple[int, ...],
    limits: Sequence[int | None],
) -> tuple[list[Segment], int | None, tuple[int, ...]]:
    """Return the segments of a stage, where they end, and the sources' indexes there.

    interval: where the stage begins, and where the next one does. A source whose epochs do not
    suffice for one more block gives its weight to the others; without others the stream ends.
    """
    start, stop = interval
    left, segments = list(weights), []
    while any(left):
        shares = Shares(units_of(left))
        blocks = {
            source: shares.blocks_within(source, limit - first[source])
            for source, limit in enumerate(limits)
            if limit is not None and shares.units[source]
        }
        fewest = min(blocks.values(), default=None)
        end = None if fewest is None else start + fewest * BLOCK
        segment = Segment(start, stage, shares, first)
        if end is None or (stop is not None and end >= stop):
            segments.append(segment)
            return segments, stop, first if stop is None else segment.indexes_at(stop)
        if end > start:
            segments.append(segment)
            start, first = end, segment.indexes_at(end)
        for source, count in blocks.items():
            if count == fewest:
                left[source] = 0.0
    return segments, start, first
