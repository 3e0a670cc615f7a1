"""Samplers: the positions of the stream that each step, rank and micro-batch reads.

Of a step of G samples, sample j is slot i of micro-batch a on rank r, where j = (a·W + r)·m + i
with W ranks and micro-batches of m. So the stream of samples is one and the same for every world
size, number of workers and accumulation that share G. Stretches of it may be left out for good: the
samples behind them move up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from modtrain.common.errors import DataError

# Positions looked up at once: enough to hide numpy's overhead, too few to delay the first batch.
_LOOKUP_POSITIONS = 1 << 14


class StreamOrder(Protocol):
    """Position in the stream → sample number."""

    def lookup(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample numbers at ``positions``, in the same shape."""


@dataclass(frozen=True)
class BatchPlan:
    """How a step's samples are assigned to ranks and micro-batches.

    micro_batch_size: samples in one forward pass of one rank (m). accumulate: micro-batches of a
    rank in a step (A). num_steps: optimizer steps of the whole run. world_size, rank: of the ranks
    that read different data (W, r).
    """

    micro_batch_size: int
    accumulate: int
    num_steps: int
    world_size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "accumulate", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, not 1 or more")
        if self.num_steps < 0 or not 0 <= self.rank < self.world_size:
            raise ValueError(f"no such plan: {self}")

    @property
    def samples_per_step(self) -> int:
        """Samples of all ranks in a step (G)."""
        return self.micro_batch_size * self.accumulate * self.world_size


def stream_positions(
    consumed: NDArray[np.int64], skipped_samples: Sequence[tuple[int, int]]
) -> NDArray[np.int64]:
    """Positions in the stream of the samples that a run consumes, int64, in the same shape.

    consumed: how many samples the run has consumed before each. skipped_samples: stretches of
    positions that it does not read, (first, one behind the last), sorted and not touching.
    """
    positions = consumed
    for first, stop in skipped_samples:
        positions = positions + (stop - first) * (positions >= first)
    return positions


class RankBatchSampler(Sampler[list[int]]):
    """Batches of sample numbers for one rank, from ``start_step`` to the end of the run.

    skipped_samples: stretches of the stream that are not read, as in `stream_positions`.

    Its length is that of the whole run, ``num_steps * accumulate``, wherever it starts: a trainer
    that counts batches over the run must not see a shorter one after a restart.
    """

    def __init__(
        self,
        order: StreamOrder,
        plan: BatchPlan,
        start_step: int = 0,
        skipped_samples: Sequence[tuple[int, int]] = (),
    ) -> None:
        if not 0 <= start_step <= plan.num_steps:
            raise ValueError(f"start_step {start_step} is not within 0 to {plan.num_steps}")
        self.order = order
        self.plan = plan
        self.start_step = start_step
        self.skipped_samples = skipped_samples

    def __len__(self) -> int:
        return self.plan.num_steps * self.plan.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        plan = self.plan
        micro_A = np.arange(plan.accumulate, dtype=np.int64) * plan.world_size + plan.rank
        slot_m = np.arange(plan.micro_batch_size, dtype=np.int64)
        in_step_Am = micro_A[:, None] * plan.micro_batch_size + slot_m
        stride = max(1, _LOOKUP_POSITIONS // in_step_Am.size)
        for first in range(self.start_step, plan.num_steps, stride):
            steps_T = np.arange(first, min(first + stride, plan.num_steps), dtype=np.int64)
            consumed_TAm = steps_T[:, None, None] * plan.samples_per_step + in_step_Am
            positions_TAm = stream_positions(consumed_TAm, self.skipped_samples)
            yield from self.order.lookup(positions_TAm).reshape(-1, plan.micro_batch_size).tolist()


class EvalBatchSampler(Sampler[list[int]]):
    """Consecutive samples, each on one rank only: rank r takes r, r + W, r + 2W and so on.

    Every rank has the same number of batches, since a forward pass may be collective; none is
    empty. All are of batch_size but the last ones of a rank, which are smaller where the samples
    do not come out even (with batch_size 1 the last may be of 2 instead).

    is_repeat: there are fewer samples than ranks, and this one computes another's along: it is not
    to be counted. first: number of the first sample.

    Raises DataError where there is no sample.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        *,
        first: int = 0,
    ) -> None:
        if num_samples < 1:
            raise DataError("validation has no samples. Prepare a larger valid split.")
        self.is_repeat = rank >= num_samples
        self.numbers = range(first + rank % num_samples, first + num_samples, world_size)
        self.batch_size = batch_size
        fewest, most = max(1, num_samples // world_size), -(-num_samples // world_size)
        self.num_batches = min(-(-most // batch_size), fewest)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for after in range(self.num_batches - 1, 0, -1):
            # Leaves a sample for each batch still to come.
            end = start + min(self.batch_size, len(self.numbers) - start - after)
            yield list(self.numbers[start:end])
            start = end
        yield list(self.numbers[start:])


class ChainedBatchSampler(Sampler[list[int]]):
    """The batches of several samplers, one after another."""

    def __init__(self, samplers: Sequence[EvalBatchSampler]) -> None:
        self.samplers = samplers

    def __len__(self) -> int:
        return sum(map(len, self.samplers))

    def __iter__(self) -> Iterator[list[int]]:
        return chain.from_iterable(self.samplers)
