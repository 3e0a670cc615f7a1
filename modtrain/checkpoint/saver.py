"""Saves beside training: one in flight, on a group and a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modtrain.checkpoint.crew import Crew
from modtrain.checkpoint.parts import (
    Part,
    Staging,
    device_of,
    digest_of,
    parts_of,
    ready_event,
)
from modtrain.checkpoint.rank_state import rank_part
from modtrain.checkpoint.recovery import prune
from modtrain.checkpoint.writing import refuse_to_overwrite, write
from modtrain.common.errors import CheckpointError
from modtrain.distributed.process_group import Ranks

log = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)


class Saver:
    """Writes the checkpoints of a run. Every method is collective: all ranks call it alike.

    A save that failed leaves what was there before as it was, and is told to every rank at the
    next `save`, `poll`, `wait` or `close`, as a `CheckpointError`. Close it where training ends, or
    use it in a ``with``, which after an error waits for nobody: a save that is not waited for ends
    with the process, and is not there.
    """

    def __init__(
        self,
        ranks: Ranks,
        keep_last: int | None = None,
        keep_every: int | None = None,
        timeout: timedelta = TIMEOUT,
    ) -> None:
        """Make the group; collective.

        keep_last, keep_every: as in `prune`, done when a newer one is on disk; None keeps all.
        timeout: how long a rank waits for the others in a save, the slowest disk included.

        ``longest`` is the seconds of the longest save so far, 0 before the first is done.
        """
        self.ranks, self.keep_last, self.keep_every = ranks, keep_last, keep_every
        self._crew = Crew.of(ranks, timeout)
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._copied = threading.Event()
        self._copied.set()
        self.longest = 0.0

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def save(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        rest: Any,
        step: int,
        rank_state: Any = None,
        *,
        blocking: bool = False,
        later: bool = False,
        dealt: bool = True,
    ) -> None:
        """Save ``tensors`` as they are now; returns when they may be changed.

        A save in flight is waited for.

        tensors: by key, plain or DTensors, the same keys on every rank, of which each writes its
        share. rest: numbers, strings, lists and small tensors, of which rank 0's are written.
        rank_state: the same, of this rank. blocking: return when it is on disk. What is on the
        host is then not copied. later: return at once, and copy beside what follows; ``tensors``
        must stay as they are until `copied` has returned. dealt: false where each rank gives other
        keys, all of which it writes.

        Raises:
            CheckpointError: ``path`` is there; this save, if blocking, or the one before failed.
            RankError: it cannot begin on another rank.
        """
        self.wait()
        with self.ranks.raise_on_all_ranks():
            if self.ranks.is_rank0:
                refuse_to_overwrite(path)
            rank, world_size = (self.ranks.rank, self.ranks.world_size) if dealt else (0, 1)
            parts = parts_of(tensors, rank, world_size)
            if rank_state is not None:
                parts.append(rank_part(rank_state, self.ranks.rank))
            digest = digest_of(tensors) if dealt else ""
        ready, on_device = ready_event(parts), device_of(parts) is not None
        copy = partial(self._copy, parts, ready, is_copy=not blocking or on_device)
        self._copied = threading.Event()
        # A rank that fails must be able to end, though its save waits for the others.
        self._thread = threading.Thread(
            target=self._write,
            args=(path, copy, rest, step, digest),
            name=f"save {path.name}",
            daemon=True,
        )
        self._thread.start()
        if blocking:
            self.wait()
        elif not later:
            self.copied()

    def copied(self) -> None:
        """Wait until the tensors of the save in flight, if there is one, may be changed."""
        self._copied.wait()

    def poll(self) -> bool:
        """Whether a save is in flight on any rank; raises if it has failed.

        Costs nothing where none is in flight, and else a small reduction over the ranks, so that
        they hear of a failure at the same step.

        Raises:
            CheckpointError: the save failed.
        """
        if self._thread is None:
            return False
        running = torch.tensor(int(self._thread.is_alive()))
        if self.ranks.group is not None:
            dist.all_reduce(running, dist.ReduceOp.MAX, group=self.ranks.group)
        if not running.item():
            self.wait()
        return self._thread is not None

    def wait(self) -> None:
        """Wait for the save in flight, if there is one.

        Raises:
            CheckpointError: it failed.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait, and let go of the memory."""
        try:
            self.wait()
        finally:
            self._staging = Staging()

    def _copy(self, parts: list[Part], ready: torch.Event | None, is_copy: bool) -> list[Part]:
        copies = self._staging.copy(parts, ready) if is_copy else parts
        self._copied.set()
        return copies

    def _write(
        self, path: Path, copy: Callable[[], list[Part]], rest: Any, step: int, digest: str
    ) -> None:
        began = time.monotonic()
        try:
            write(path, copy, rest, step, self._crew, digest)
            self.longest = max(self.longest, time.monotonic() - began)
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._copied.set()
        if self._crew.is_first and self.keep_last is not None:
            try:
                prune(path.parent, self.keep_last, self.keep_every)
            except (OSError, CheckpointError) as error:
                log.warning("old checkpoints could not be removed: %s", error)
