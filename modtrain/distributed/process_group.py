"""The processes of a run, and how they agree.

A failure on one rank alone is a hang on the others: they enter the next collective, and it does
not. So whatever may fail on one rank goes through `Ranks.raise_on_all_ranks`.
"""

from __future__ import annotations

import itertools
import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from modtrain.common.errors import ModtrainError, RankError
from modtrain.distributed.launch import Launch

T = TypeVar("T")

_store_numbers = itertools.count()


class Ranks:
    """The processes of a run, over a gloo group; without a group it is this process alone.

    The group is gloo whatever the devices are, and used by nothing else: it does not mix with the
    collectives of training, and works where the device no longer does. With one process every
    method returns at once.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, store: Store | None = None) -> None:
        """Use ``group``. store: of the rendezvous."""
        self.group, self.store = group, store
        self.world_size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self._in_flight: tuple[Tensor, Any] | None = None

    @classmethod
    def create(cls, timeout: timedelta | None = None, store: Store | None = None) -> Ranks:
        """Make a new group of all processes; collective.

        timeout: how long a rank waits for the others, once there is the group; None: as in all
        groups. store: of the rendezvous.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls(store=store)
        group = dist.new_group(backend="gloo")
        if timeout is not None:
            # Not before: with half an hour for saves, a rank that died would be waited for as long.
            distributed_c10d._set_pg_timeout(timeout, group)
        return cls(group, store)

    def duplicate(self, timeout: timedelta | None = None) -> Ranks:
        """Return the same ranks over a group of their own, for another thread; collective."""
        return self if self.group is None else Ranks.create(timeout)

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0, which writes the shared files."""
        return self.rank == 0

    def broadcast_from_rank0(self, value: T) -> T:
        """Return rank 0's value on every rank. For small picklable values."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def all_gather_object(self, value: T) -> list[T]:
        """Return every rank's value, in the order of ranks. For small picklable values."""
        if self.group is None:
            return [value]
        # Every entry is overwritten.
        values = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_object(self, value: T) -> list[T] | None:
        """Return every rank's value on rank 0, None on the others."""
        if self.group is None:
            return [value]
        values: list[T] | None = [value] * self.world_size if self.is_rank0 else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values

    def run_on_rank0(self, work: Callable[[], T]) -> T:
        """Call ``work`` on rank 0; return its small result, or raise its error, on every rank."""
        result: Any = None
        with self.raise_on_all_ranks():
            if self.is_rank0:
                result = work()
        return cast(T, self.broadcast_from_rank0(result))

    def any(self, value: bool) -> bool:
        """Whether ``value`` is true on any rank."""
        if self.group is None:
            return value
        flag = torch.tensor(int(value))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over ranks of a tensor on the CPU, the same on every rank."""
        if self.group is None:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def any_at_last_call(self, value: bool) -> bool:
        """Whether ``value`` of the previous call was true on any rank; with one process, of this.

        The reduction of this call's value runs while the ranks compute, so no rank waits for it.
        """
        if self.group is None:
            return value
        previous = self._in_flight
        flag = torch.tensor(int(value))
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self._in_flight = (flag, work)
        if previous is None:
            return False
        flag, work = previous
        work.wait()
        return bool(flag)

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """End the block on all ranks or on none: an error on one rank is raised on every rank.

        The block must not contain a collective: a rank that fails before it would not take part.

        Raises:
            RankError: another rank's error, with its rank and host.
            Exception: this rank's own error, unchanged.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        # Usually one number; the texts are gathered only after an error.
        if not self.any(own is not None):
            return
        text = "" if own is None else f"{host_and_pid()}: {format_error(own)}"
        texts = self.all_gather_object(text)
        if own is not None:
            raise own
        failures = {rank: text for rank, text in enumerate(texts) if text}
        rank, text = next(iter(failures.items()))
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise RankError(f"rank {rank}{more} on {text}")


ONE_PROCESS = Ranks()


@contextmanager
def init_ranks(
    launch: Launch,
    device_type: str,
    timeout: timedelta,
    needs_group: bool,
    check: Callable[[Store], None] | None = None,
) -> Iterator[Ranks]:
    """Initialize torch.distributed for ``launch`` for the length of the block; collective.

    device_type: where training's tensors are; `Ranks` communicates over gloo anyway.
    timeout: how long a rank waits for the others, in groups that libraries make in the block too.
    needs_group: make a group for one process too, for strategies that need one. check: is called
        with the store of the rendezvous before several processes make a group.

    Raises:
        RankError: not all processes arrived in time.
    """
    if launch.world_size == 1 and not needs_group:
        yield ONE_PROCESS
        return
    # Every gloo group has a socket to each other process.
    _, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, maximum))
    on_cuda = device_type == "cuda"
    try:
        store = _rendezvous_store(launch, timeout)
        if check is not None and launch.world_size > 1:
            check(store)
        if on_cuda:
            torch.cuda.set_device(launch.local_rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=PrefixStore("groups", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
            device_id=torch.device("cuda", launch.local_rank) if on_cuda else None,
        )
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankError(
            f"rank {launch.rank} of {launch.world_size} on {socket.gethostname()} did not meet the"
            f" others at {address} within {timeout.total_seconds():.0f} s: {error}"
        ) from error
    try:
        with _default_timeout(timeout):
            yield Ranks.create(store=store)
    finally:
        dist.destroy_process_group()


@contextmanager
def _default_timeout(timeout: timedelta) -> Iterator[None]:
    """Give ``timeout`` to groups that are made without one, as those of meshes and DeepSpeed are.

    torch does not take it from the group of all ranks: a rank whose peer dies before it comes would
    wait for half an hour.
    """
    names = ("default_pg_timeout", "default_pg_nccl_timeout")
    before = {name: getattr(distributed_c10d, name) for name in names}
    try:
        for name in names:
            setattr(distributed_c10d, name, timeout)
        yield
    finally:
        for name, value in before.items():
            setattr(distributed_c10d, name, value)


def _rendezvous_store(launch: Launch, timeout: timedelta) -> Store:
    """Return the store through which the processes find each other."""
    if launch.world_size == 1:
        return HashStore()
    results = rendezvous("env://", rank=launch.rank, world_size=launch.world_size, timeout=timeout)
    store: Store = next(results)[0]
    # A launcher's store outlives a group, and keeps its keys.
    return PrefixStore(f"run{next(_store_numbers)}", store)


def host_and_pid() -> str:
    """Name this process in messages that other ranks show: host and process id."""
    return f"{socket.gethostname()}, process {os.getpid()}"


def is_alive_here(process: str) -> bool:
    """Whether a process, as `host_and_pid` names it, still runs on this host; Linux only."""
    host, _, pid = process.rpartition(", process ")
    if host != socket.gethostname():
        return False
    try:
        state = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError, IndexError):
        return False
    # A process that has ended stays in the list until its parent has asked for its exit code.
    return state not in ("Z", "X")


def format_error(error: BaseException) -> str:
    """Return an error's text, with its type unless it is one of modtrain's own."""
    return str(error) if isinstance(error, ModtrainError) else f"{type(error).__name__}: {error}"
