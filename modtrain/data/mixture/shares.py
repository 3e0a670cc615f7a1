"""Weights → whose each slot of a block is, by whole numbers alone.

The stream is divided in blocks of `BLOCK` slots, and `PERIOD` blocks are a period. The sources'
shares, as whole units that add up to the slots of a period, lie end to end on a line. Block j takes
every `PERIOD`-th unit of the line, from one on that the bits of j reversed give (van der Corput);
slot t belongs to the source in whose share the t-th of these units lies (systematic sampling). So
each source has in every block its share rounded down or up, and in every period its share exactly.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, pairwise

BLOCK = 64
"""Samples in a block."""
PERIOD = 1024
"""Blocks in a period."""
_UNITS = BLOCK * PERIOD
SMALLEST_SHARE = f"1/{_UNITS}"
_PERIOD_BITS = PERIOD.bit_length() - 1


def units_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Apportion the samples of a period by ``weights``, by largest remainders.

    Each source's units are within 1 of its exact share, and none where its weight is 0. Equal
    remainders go to the first ones. At least one weight is above 0.
    """
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    quotas = [weight * _UNITS / total for weight in exact]
    units = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(units)), key=lambda s: units[s] - quotas[s])
    for source in by_remainder[: _UNITS - sum(units)]:
        units[source] += 1
    return tuple(units)


def first_unit(block: int) -> int:
    """The first unit on the line that a block takes: the bits of its number in the period."""
    return int(f"{block % PERIOD:0{_PERIOD_BITS}b}"[::-1], 2)


@dataclass(frozen=True)
class Shares:
    """The sources' units, which add up to the samples of a period."""

    units: tuple[int, ...]

    @cached_property
    def edges(self) -> tuple[int, ...]:
        """Where each source's share begins on the line, and where the last one ends."""
        return tuple(accumulate(self.units, initial=0))

    def first_slots(self, block: int) -> list[int]:
        """The slot of a block at which each source begins, and `BLOCK`, before slots are mixed."""
        first = first_unit(block)
        return [-(-(edge - first) // PERIOD) for edge in self.edges]

    @cached_property
    def samples_until(self) -> list[list[int]]:
        """Samples of each source in the first n blocks of a period, for n from 0 to `PERIOD`."""
        rows = [[0] * len(self.units)]
        for block in range(PERIOD):
            slots = self.first_slots(block)
            counts = [after - before for before, after in pairwise(slots)]
            rows.append([had + more for had, more in zip(rows[-1], counts, strict=True)])
        return rows

    def samples_in(self, source: int, num_blocks: int) -> int:
        """Samples of a source in the first ``num_blocks`` blocks."""
        periods, blocks = divmod(num_blocks, PERIOD)
        return periods * self.units[source] + self.samples_until[blocks][source]

    def blocks_within(self, source: int, num_samples: int) -> int:
        """The most blocks with at most ``num_samples`` of a source, whose share is not 0."""
        most = (num_samples // self.units[source] + 1) * PERIOD + 1
        return bisect_right(range(most), num_samples, key=lambda n: self.samples_in(source, n)) - 1
