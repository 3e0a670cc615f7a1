"""Position in the stream of a mixture → source, and index in it. Imports no torch."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from modtrain.common.errors import DataError
from modtrain.data.mixture.schedule import MixtureSchedule, Segment
from modtrain.data.mixture.shares import BLOCK, PERIOD, first_unit
from modtrain.data.stream.order import SampleOrder

# So that the slots of a block are not mixed as the samples of a source are.
_SLOT_SEED = 0x6D6978
_FIRST_UNITS = np.array([first_unit(block) for block in range(PERIOD)], dtype=np.int64)


class MixtureOrder:
    """Position in the stream of a mixture → number in its `MixtureDataset`.

    Within a source the samples come as those of its directory alone do, by their own index.
    """

    def __init__(
        self, schedule: MixtureSchedule, num_samples: list[int], seed: int, shuffle: bool = True
    ) -> None:
        """num_samples: of each source in an epoch, by the schedule's names."""
        self.schedule = schedule
        self._slots = SampleOrder(BLOCK, seed ^ _SLOT_SEED, shuffle)
        self._first_numbers = list(accumulate(num_samples, initial=0))
        # A source without a sample is never read.
        self._orders = [SampleOrder(max(1, count), seed, shuffle) for count in num_samples]
        self._starts = np.array([segment.start for segment in schedule.segments], dtype=np.int64)
        self._segments = [_Lookup(segment) for segment in schedule.segments]

    @property
    def identity(self) -> list[object]:
        """What decides over the order, seed and counts aside, as plain values."""
        parts = self.schedule.segments
        return [[part.start, *part.shares.units, *part.first] for part in parts]

    def samples_between(self, start: int, stop: int) -> list[int]:
        """How many samples of each source stand from ``start`` to one before ``stop``."""
        counts_2 = [self._samples_before(position) for position in (start, stop)]
        return [after - before for before, after in zip(*counts_2, strict=True)]

    def _samples_before(self, position: int) -> list[int]:
        block = position - position % BLOCK
        segments = self.schedule.before(block)
        counts = [0] * len(self._orders)
        if segments:
            counts = list(segments[-1].indexes_at(block))
        sources, _ = self.places(np.arange(block, position, dtype=np.int64))
        for source in sources.tolist():
            counts[source] += 1
        return counts

    def lookup(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample numbers at ``positions``, in the same shape, both int64.

        Raises DataError behind the last sample that the sources' epochs suffice for.
        """
        positions = np.asarray(positions, dtype=np.int64)
        sources_P, indexes_P = self.places(positions.ravel())
        numbers_P = np.empty_like(indexes_P)
        for source in np.unique(sources_P).tolist():
            mine = sources_P == source
            own = self._orders[source].lookup(indexes_P[mine])
            numbers_P[mine] = own + self._first_numbers[source]
        return numbers_P.reshape(positions.shape)

    def places(self, positions_P: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source at each position, and its index there: samples of the source before it."""
        end = self.schedule.end
        if end is not None and positions_P.size and positions_P.max() >= end:
            raise DataError(
                f"the sources' max_epochs suffice for {end:,} samples, and the run reads more:"
                " raise data.sources.….max_epochs"
            )
        sources_P, indexes_P = np.empty_like(positions_P), np.empty_like(positions_P)
        segments_P = np.searchsorted(self._starts, positions_P, side="right") - 1
        slots_P = self._slots.lookup(positions_P)
        for number in np.unique(segments_P).tolist():
            mine = segments_P == number
            places = self._segments[number].places(positions_P[mine], slots_P[mine])
            sources_P[mine], indexes_P[mine] = places
        return sources_P, indexes_P


class _Lookup:
    """The tables of one segment."""

    def __init__(self, segment: Segment) -> None:
        shares, self.start = segment.shares, segment.start
        self.edges = np.array(shares.edges, dtype=np.int64)
        self.units = np.array(shares.units, dtype=np.int64)
        self.first = np.array(segment.first, dtype=np.int64)
        self.samples_until = np.array(shares.samples_until, dtype=np.int64)

    def places(
        self, positions_P: NDArray[np.int64], slots_P: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sources and indexes at positions of the segment; slots_P: of each in its block."""
        periods_P, blocks_P = np.divmod((positions_P - self.start) // BLOCK, PERIOD)
        first_P = _FIRST_UNITS[blocks_P]
        sources_P = np.searchsorted(self.edges, slots_P * PERIOD + first_P, side="right") - 1
        before_P = periods_P * self.units[sources_P] + self.samples_until[blocks_P, sources_P]
        # The first slot of the source in the block: a division that rounds up.
        first_slots_P = -((first_P - self.edges[sources_P]) // PERIOD)
        return sources_P, self.first[sources_P] + before_P + slots_P - first_slots_P
