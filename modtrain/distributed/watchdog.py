"""Who failed, when ranks wait for one another: a board that all can read, and a watch on each rank.

A rank that fails says why on the board before it ends. The others find out by a collective that
breaks or does not return; they look at the board, and name the rank, its host and its reason. A
rank that hangs is told apart by its silence; its own watch, a thread, writes where it stands.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from modtrain.common.errors import CheckpointError, RankError, TrainingError
from modtrain.distributed.process_group import Ranks, here, said

# Seconds that what waits for disks or the compiler may take: as long as ranks wait in a save.
PATIENCE = 1800.0
# How long a rank whose collective broke waits for the others to say why.
_GRACE = 5.0
_BROKEN = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket"),
    *("Timed out waiting", "timed out", "Connection refused", "recv", "gloo", "NCCL"),
)


class Watch:
    """One rank's thread that sees whether its main thread gets on."""

    def __init__(
        self, store: Store, rank: int, world_size: int, timeout: float, logs: Path | None
    ) -> None:
        """Start watching.

        store: the board; not one that the main thread waits at. timeout: seconds without a
        `tick` after which a rank counts as stuck. logs: where the stacks of a stuck rank go.
        """
        self.store, self.rank, self.world_size = store, rank, world_size
        self.timeout, self.logs = timeout, logs
        self._where, self._ticked = "start", time.monotonic()
        self._patience, self._told = timeout, False
        # Where rank 0 is, whose process has the board if no launcher has it.
        self._first = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def tick(self, where: str, patience: float = 0.0) -> None:
        """Say that the main thread got to ``where``. Cheap: no rank hears of it yet.

        patience: seconds that what begins there may well take, where that is more than the timeout.
        The others' own waiting ends at theirs all the same.
        """
        self._where, self._ticked, self._told = where, time.monotonic(), False
        self._patience = max(self.timeout, patience)

    def close(self) -> None:
        """Stop watching."""
        self._end.set()
        self._thread.join()

    def post(self, kind: str, text: str) -> None:
        """Put up what became of this rank: ``failed``, ``waits`` or ``stuck``.

        The first one to blame has a key of its own, so that nobody has to read all posts.
        """
        told = json.dumps([self.rank, kind, here(), text])
        with suppress(Exception):
            # The board is gone where rank 0 is.
            if kind != "waits":
                self.store.compare_set("blame", "", told)
            self.store.set(f"post/{self.rank}", told)
            self.store.add("posts", 1)

    def fail(self, text: str) -> None:
        """Say why this rank ends; the one that has the board stays until the others know."""
        self.post("failed", text)
        if self.rank == 0:
            deadline = time.monotonic() + _GRACE
            with suppress(Exception):
                while time.monotonic() < deadline and self._num_posts() < self.world_size:
                    time.sleep(self._pause)

    def explain(self, error: BaseException) -> RankError | None:
        """Return why a collective broke here, as far as the ranks say.

        None: nobody else failed, so the error is this rank's own.
        """
        self.post("waits", str(error))
        try:
            blamed, before = self._blame(), {}
            if blamed is None:
                before = self._beats()
                blamed = self._wait_for_blame()
            if blamed is not None:
                rank, kind, host, text = blamed
                if rank == self.rank:
                    return None
                verb = "failed" if kind == "failed" else "does not get on"
                return RankError(f"rank {rank} on {host} {verb}: {text}")
            everybody = range(self.world_size)
            silent = [rank for rank in everybody if not self.store.check([f"post/{rank}"])]
            return RankError(self._silent(silent, before)) if silent else None
        except Exception:
            where = f"rank 0{f' on {self._first}' if self._first else ''}"
            return RankError(f"{where} has died, or is not to be reached: it keeps the board")

    def _wait_for_blame(self) -> tuple[int, str, str, str] | None:
        """Return who is to blame, kind, host and text; None when all wait, or it is late."""
        # A rank is alive that reports meanwhile.
        deadline = time.monotonic() + max(_GRACE, 3 * self._beat)
        while time.monotonic() < deadline:
            if (blamed := self._blame()) is not None:
                return blamed
            if self._num_posts() >= self.world_size:
                break
            time.sleep(self._pause)
        return None

    def _blame(self) -> tuple[int, str, str, str] | None:
        if not self.store.check(["blame"]):
            return None
        rank, kind, host, text = json.loads(self.store.get("blame"))
        return rank, kind, host, text

    def _num_posts(self) -> int:
        return int(self.store.add("posts", 0))

    def _beats(self) -> dict[int, Any]:
        """Return the last report of every rank that has made one."""
        found = {}
        for rank in range(self.world_size):
            if self.store.check([f"seen/{rank}"]):
                found[rank] = json.loads(self.store.get(f"seen/{rank}"))
        return found

    def _silent(self, ranks: list[int], before: dict[int, Any]) -> str:
        """Say of ranks that do not answer when they were last seen."""
        now = self._beats()
        lines = []
        for rank in ranks:
            if rank not in now:
                lines.append(f"rank {rank} is not to be reached")
                continue
            host, where, idle, beat = now[rank]
            is_alive = rank in before and beat != before[rank][3]
            state = f"has been at {where} for {idle:.0f} s" if is_alive else "has died"
            lines.append(f"rank {rank} on {host} {state}; its last report was from {where}")
        return "; ".join(lines) + ". Its own output, or its stacks in logs/, may say why"

    @property
    def _beat(self) -> float:
        return min(10.0, max(0.2, self.timeout / 8))

    @property
    def _pause(self) -> float:
        """Seconds between two looks; all ranks look at one store."""
        return max(0.05, self.world_size / 1000)

    def _run(self) -> None:
        beats, host = 0, here()
        while beats == 0 or not self._end.wait(self._beat):
            beats += 1
            idle = time.monotonic() - self._ticked
            with suppress(Exception):
                report = [host, self._where, round(idle, 1), beats]
                self.store.set(f"seen/{self.rank}", json.dumps(report))
                if self.store.check(["seen/0"]):
                    self._first = json.loads(self.store.get("seen/0"))[0]
                if idle > self.timeout:
                    self._stuck(idle)

    def _stuck(self, idle: float) -> None:
        """Write the stacks; end where others wait for this rank, which may be for ever."""
        is_awaited = self._num_posts() > 0 and not self.store.check([f"post/{self.rank}"])
        if not self._told and (is_awaited or idle > self._patience):
            self._told = True
            self._dump(idle)
        if is_awaited:
            self.post("stuck", f"at {self._where} for {idle:.0f} s, in {self._main_frame()}")
            if self.rank == 0:
                # The board goes with this process: the others are reading it.
                time.sleep(_GRACE)
            os._exit(1)

    def _dump(self, idle: float) -> None:
        text = f"rank {self.rank} has not got on from {self._where} for {idle:.0f} s; its threads:"
        print(text, file=sys.stderr, flush=True)  # noqa: T201
        faulthandler.dump_traceback(all_threads=True)
        if self.logs is not None:
            with suppress(OSError), (self.logs / f"stacks-rank-{self.rank:05d}.txt").open("a") as f:
                f.write(text + "\n")
                f.flush()
                faulthandler.dump_traceback(f, all_threads=True)

    def _main_frame(self) -> str:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        if frame is None:
            return "an unknown place"
        return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"


@contextmanager
def watching(ranks: Ranks, timeout: float, logs: Path | None) -> Iterator[Watch | None]:
    """Watch this rank for the length of the block; None where it is alone.

    An error inside is told to the others; where one comes from another rank, that is named.

    Raises:
        RankError: a collective broke because of another rank.
        TrainingError: memory ran out.
        BaseException: this rank's own error, as it is.
    """
    watch = None
    if ranks.store is not None and ranks.world_size > 1:
        # Of its own: the main thread may be waiting at the other one.
        board = ranks.store.clone()  # type: ignore[attr-defined]
        watch = Watch(board, ranks.rank, ranks.world_size, timeout, logs)
    try:
        yield watch
    except BaseException as error:
        own = _out_of_memory(error) or error
        if watch is not None:
            if _is_broken_collective(error) and (cause := watch.explain(error)) is not None:
                raise cause from error
            if not isinstance(error, RankError):
                watch.fail(said(own))
        if own is not error:
            raise own from error
        raise
    finally:
        if watch is not None:
            watch.close()


def _is_broken_collective(error: BaseException | None) -> bool:
    """Whether a collective broke, or it is why something else did."""
    if error is None:
        return False
    broke = isinstance(error, dist.DistError)
    if isinstance(error, RuntimeError | CheckpointError):
        broke = broke or any(word in str(error) for word in _BROKEN)
    return broke or _is_broken_collective(error.__cause__)


def _out_of_memory(error: BaseException) -> TrainingError | None:
    is_own = isinstance(error, MemoryError | torch.OutOfMemoryError)
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if not is_own and "can't allocate memory" not in str(error):
        return None
    return TrainingError(
        f"out of memory: {first}\n"
        "remedy: set strategy.activation_checkpointing=full, or strategy=fsdp on more processes; or"
        " lower batch.micro_batch_size, which changes no result but to rounding (a model that"
        " learns from a micro-batch as a whole does not go on with another: docs/reference/runs.md)"
    )
