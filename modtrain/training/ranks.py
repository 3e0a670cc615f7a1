"""The processes of a run, and how they come to one answer.

What one rank alone decides, the others learn by waiting for ever: they enter the next collective,
and it does not. So whatever may fail on one rank goes through here.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from modtrain.errors import ModtrainError, RankError

T = TypeVar("T")


class Ranks:
    """The processes of a run. Without a process group there is one, and nothing to agree on.

    Agreement goes over a group of its own, gloo whatever the devices are: it must not come between
    the collectives of training, and works where the device no longer does.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        """Make the group; collective. timeout: how long a rank waits for the others."""
        self.world_size, self.rank = 1, 0
        self.group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
            self.group = dist.new_group(backend="gloo", timeout=timeout)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def new_group(self, timeout: timedelta | None = None) -> dist.ProcessGroup | None:
        """Make one more gloo group of all ranks; collective. None where there is one process."""
        if self.group is None:
            return None
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
        return group

    def first(self, value: T) -> T:
        """Return what rank 0 gave, on every rank. Plain, small things alone."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def each(self, value: T) -> list[T]:
        """Return what every rank gave, in the order of ranks. Plain, small things alone."""
        if self.group is None:
            return [value]
        # Each is overwritten, its own with an equal one.
        values = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def any(self, value: bool) -> bool:
        """Whether it is so on any rank."""
        return any(self.each(value))

    @contextmanager
    def together(self) -> Iterator[None]:
        """End the block on all ranks or on none: an error on one of them is raised on every one.

        The block must not hold a collective: a rank that fails before it would not take part.

        Raises:
            RankError: another rank's error, which it names with its host.
            Exception: this rank's own error, as it is.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        told = self.each("" if own is None else _told(own))
        if own is not None:
            raise own
        failed = {rank: said for rank, said in enumerate(told) if said}
        if failed:
            rank, said = next(iter(failed.items()))
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise RankError(f"rank {rank}{more} on {said}")


def _told(error: Exception) -> str:
    said = str(error) if isinstance(error, ModtrainError) else f"{type(error).__name__}: {error}"
    return f"{socket.gethostname()}, process {os.getpid()}: {said}"
