"""The ranks of one save or load, over one group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch.distributed as dist

from modtrain.common.errors import CheckpointError, RankError
from modtrain.distributed.process_group import Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Crew:
    """Ranks that work on one checkpoint. Without a group it is one process alone.

    The group is of nobody else: what a save says comes while training has its own collectives.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    world_size: int = 1

    @classmethod
    def of(cls, ranks: Ranks, timeout: timedelta | None = None) -> Crew:
        """Make a new group of all ``ranks``; collective."""
        return cls(ranks.new_group(timeout), ranks.rank, ranks.world_size)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def gather(self, value: T) -> list[T] | None:
        """Return what every rank gave on rank 0, None on the others."""
        if self.group is None:
            return [value]
        values: list[T] | None = [value] * self.world_size if self.is_first else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values

    def first(self, work: Callable[[], T]) -> T:
        """Let rank 0 do ``work``; return its result on every rank.

        Raises:
            Exception: on rank 0 its own error. CheckpointError, or RankError for another kind: on
                the others, with the same text.
        """
        result, failure = None, None
        if self.is_first:
            try:
                result = work()
            except Exception as error:
                failure = error
        # As text: not every error can be sent.
        box = [(result, None if failure is None else str(failure), _is_plain(failure))]
        if self.group is not None:
            dist.broadcast_object_list(box, src=0, group=self.group)
        result, said, is_plain = box[0]
        if failure is not None:
            raise failure
        if said is not None:
            raise CheckpointError(said) if is_plain else RankError(f"rank 0: {said}")
        return cast(T, result)


def _is_plain(error: Exception | None) -> bool:
    return isinstance(error, CheckpointError)
