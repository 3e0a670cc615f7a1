"""A run's checkpoints are saved in the background, on a thread of their own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modtrain.checkpoint.parts import Part, Staging, device_of, digest_of, parts_of, ready_event
from modtrain.checkpoint.recovery import prune
from modtrain.checkpoint.state import rank_part
from modtrain.checkpoint.writing import refuse_to_overwrite, write
from modtrain.common.errors import CheckpointError, ModtrainError, RankError
from modtrain.distributed.process_group import Ranks
from modtrain.distributed.watchdog import SLOW_TIMEOUT

log = logging.getLogger(__name__)


class Checkpointer:
    """Saves checkpoints. Every method is collective: all ranks call it alike.

    At most one save is in flight. A save that fails leaves what was there before as it was; the
    next `save`, `poll`, `wait` or `close` raises its error on every rank. Close it where training
    ends, or use it in a ``with``, which waits after an error only if it is one of modtrain's and no
    other rank's, which may take part in the save. One that is not waited for ends with the process,
    and leaves no checkpoint.
    """

    def __init__(
        self,
        ranks: Ranks,
        keep_last: int | None = None,
        keep_every: int | None = None,
        timeout: timedelta = timedelta(seconds=SLOW_TIMEOUT),
        keep_steps: Collection[int] = (),
        on_saved: Callable[[int], None] | None = None,
    ) -> None:
        """Make the group that saves communicate over; collective.

        keep_last, keep_every, keep_steps: as in `prune`, done when a newer one is on disk;
        ``keep_last=None`` keeps all.
        on_saved: called on rank 0 with the step of each save, when it is on disk; an OSError of it
        is a warning.
        timeout: how long a rank waits for the others in a save, the slowest disk included.

        ``longest_save`` is the seconds of the longest save so far, 0 before the first is done.
        """
        self.ranks, self.keep_last, self.keep_every = ranks, keep_last, keep_every
        self.keep_steps, self.on_saved = keep_steps, on_saved
        self._save_ranks = ranks.duplicate(timeout)
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._copied = threading.Event()
        self._copied.set()
        self.longest_save = 0.0

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is None:
            self.close()
        elif isinstance(error, ModtrainError) and not isinstance(error, RankError):
            with suppress(CheckpointError):
                self.close()

    def save(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        extra_state: Any,
        step: int,
        rank_state: Any = None,
        *,
        blocking: bool = False,
        async_copy: bool = False,
        deduplicate: bool = True,
    ) -> None:
        """Save ``tensors`` as they are now; return when they may be changed.

        A save in flight is waited for.

        tensors: by key, plain or DTensors, with the same keys on every rank, each of which writes
        its share. extra_state: numbers, strings, lists and small tensors; rank 0's are written.
        rank_state: the same, of this rank. blocking: return when the checkpoint is on disk; tensors
        on the host are then not copied. async_copy: return at once, and copy in the background;
        ``tensors`` must not change until `wait_for_copy` has returned. deduplicate: False where
        each rank passes other keys, all of which it writes.

        Raises:
            CheckpointError: ``path`` exists; this save, if blocking, or the one before failed.
            RankError: another rank cannot begin.
        """
        self.wait()
        with self.ranks.raise_on_all_ranks():
            rank, world_size = self.ranks.rank, self.ranks.world_size
            if self.ranks.is_rank0:
                refuse_to_overwrite(path)
            parts = parts_of(tensors, *((rank, world_size) if deduplicate else (0, 1)))
            if rank_state is not None:
                parts.append(rank_part(rank_state, rank))
            digest = digest_of(tensors) if deduplicate else ""
        ready, on_device = ready_event(parts), device_of(parts) is not None
        copy = partial(self._copy, parts, ready, is_needed=not blocking or on_device)
        self._copied = threading.Event()
        # A daemon: a rank that fails must be able to end although its save waits for the others.
        self._thread = threading.Thread(
            target=self._write,
            args=(path, copy, extra_state, step, digest),
            name=f"save {path.name}",
            daemon=True,
        )
        self._thread.start()
        if blocking:
            self.wait()
        elif not async_copy:
            self.wait_for_copy()

    def wait_for_copy(self) -> None:
        """Wait until the tensors of the save in flight, if there is one, may be changed."""
        self._copied.wait()

    def poll(self) -> bool:
        """Whether a save is in flight on any rank; raise CheckpointError if it has failed.

        Free when none is in flight; otherwise a small reduction, so that all ranks learn of a
        failure at the same step.
        """
        if self._thread is None:
            return False
        if not self.ranks.any(self._thread.is_alive()):
            self.wait()
        return self._thread is not None

    def wait(self) -> None:
        """Wait for the save in flight, if there is one; raise CheckpointError if it failed."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait, and free the host memory of the copies."""
        try:
            self.wait()
        finally:
            self._staging = Staging()

    def _copy(self, parts: list[Part], ready: torch.Event | None, is_needed: bool) -> list[Part]:
        copies = self._staging.copy(parts, ready) if is_needed else parts
        self._copied.set()
        return copies

    def _write(
        self, path: Path, copy: Callable[[], list[Part]], extra_state: Any, step: int, digest: str
    ) -> None:
        began = time.monotonic()
        try:
            write(path, copy, extra_state, step, self._save_ranks, digest)
            self.longest_save = max(self.longest_save, time.monotonic() - began)
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._copied.set()
        if self._save_ranks.is_rank0:
            self._after_save(path, step)

    def _after_save(self, path: Path, step: int) -> None:
        try:
            if self.on_saved is not None:
                self.on_saved(step)
        except OSError as error:
            log.warning("that step %d is saved could not be recorded: %s", step, error)
        try:
            if self.keep_last is not None:
                keep = self.keep_last, self.keep_every
                prune(path.parent, *keep, keep_steps=self.keep_steps)
        except (OSError, CheckpointError) as error:
            log.warning("old checkpoints could not be removed: %s", error)
