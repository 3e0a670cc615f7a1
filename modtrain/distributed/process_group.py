"""The processes of a run, and how they come to one answer.

What one rank alone decides, the others learn by waiting for ever: they enter the next collective,
and it does not. So whatever may fail on one rank goes through here.
"""

from __future__ import annotations

import itertools
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from modtrain.common.errors import ModtrainError, RankError
from modtrain.distributed.launch import Launch

T = TypeVar("T")

_joined = itertools.count()


class Ranks:
    """The processes of a run. Where there is one, there is nothing to agree on.

    Agreement goes over a group of its own, gloo whatever the devices are: it must not come between
    the collectives of training, and works where the device no longer does.
    """

    def __init__(self, timeout: timedelta | None = None, store: Store | None = None) -> None:
        """Make the group; collective.

        timeout: how long a rank waits for the others. store: where the ranks met.
        """
        self.world_size, self.rank, self.store = 1, 0, store
        self.group: dist.ProcessGroup | None = None
        self._asked: tuple[Tensor, Any] | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
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
        return bool(self._max(int(value)))

    def _max(self, value: int) -> int:
        if self.group is None:
            return value
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
        return int(number)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over ranks of a tensor on the CPU, the same on every rank."""
        if self.group is None:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def any_before(self, value: bool) -> bool:
        """Whether it was so on any rank at the last call; alone, whether it is so now.

        The answer to this call's question travels while the ranks compute, so nobody waits.
        """
        if self.group is None:
            return value
        before = self._asked
        flag = torch.tensor(int(value))
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self._asked = (flag, work)
        if before is None:
            return False
        told, work = before
        work.wait()
        return bool(told)

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
        # One number as a rule; who said what only where somebody did.
        if not self.any(own is not None):
            return
        told = self.each("" if own is None else f"{here()}: {said(own)}")
        if own is not None:
            raise own
        failed = {rank: text for rank, text in enumerate(told) if text}
        rank, text = next(iter(failed.items()))
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise RankError(f"rank {rank}{more} on {text}")


@contextmanager
def joined(
    launch: Launch, device_type: str, timeout: timedelta, needs_group: bool
) -> Iterator[Ranks]:
    """Join the processes of ``launch`` for the length of the block; collective.

    device_type: where tensors of training are; agreement goes over gloo anyway.
    needs_group: also a process that is alone gets a group, for strategies that ask for one.

    Raises:
        RankError: not all came in time.
    """
    if launch.world_size == 1 and not needs_group:
        yield Ranks()
        return
    # Every gloo group has a socket to each other process.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    on_cuda = device_type == "cuda"
    if on_cuda:
        torch.cuda.set_device(launch.local_rank)
    try:
        store = _meet(launch, timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=PrefixStore("groups", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
            device_id=torch.device("cuda", launch.local_rank) if on_cuda else None,
        )
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankError(
            f"rank {launch.rank} of {launch.world_size} on {socket.gethostname()} did not meet the"
            f" others at {where} within {timeout.total_seconds():.0f} s: {error}"
        ) from error
    try:
        yield Ranks(timeout, store)
    finally:
        dist.destroy_process_group()


def _meet(launch: Launch, timeout: timedelta) -> Store:
    """Return the store through which the processes find each other."""
    if launch.world_size == 1:
        return HashStore()
    found = rendezvous("env://", rank=launch.rank, world_size=launch.world_size, timeout=timeout)
    store: Store = next(found)[0]
    # A launcher's store outlives a group, with what the last one left there.
    return PrefixStore(f"run{next(_joined)}", store)


def here() -> str:
    """Name this process to other ranks' readers: its host and number."""
    return f"{socket.gethostname()}, process {os.getpid()}"


def said(error: BaseException) -> str:
    """Return an error's text, with its kind where a user would not expect it."""
    return str(error) if isinstance(error, ModtrainError) else f"{type(error).__name__}: {error}"
