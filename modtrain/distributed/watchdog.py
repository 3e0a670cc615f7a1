"""Which rank failed or hangs: a watchdog thread on each rank, and a store that all ranks read.

A rank that fails publishes its reason before it ends. The others notice by a collective that breaks
or does not return; they read the store, and name the rank, its host and its reason. A rank that
hangs stops sending heartbeats; its own watchdog writes the stacks of its threads.
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
from modtrain.distributed.process_group import (
    Ranks,
    format_error,
    host_and_pid,
    is_alive_here,
)

# Seconds that disks or the compiler may take: as long as ranks wait in a save.
SLOW_TIMEOUT = 1800.0
# Seconds that a rank waits for the others' reports after its collective broke.
_GRACE = 5.0
_BROKEN_COLLECTIVE = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket"),
    *("Timed out waiting", "timed out", "Connection refused", "recv", "gloo", "NCCL"),
)


# Rank, kind, host and text, as `Watchdog.publish_failure` writes them.
Failure = tuple[int, str, str, str]


class Watchdog:
    """A thread that watches whether this rank's main thread makes progress."""

    def __init__(
        self, store: Store, rank: int, world_size: int, timeout: float, logs: Path | None
    ) -> None:
        """Start the thread.

        store: a connection that the main thread does not wait on. timeout: seconds without a
        `heartbeat` after which a rank counts as stuck. logs: where a stuck rank's stacks go.
        """
        self.store, self.rank, self.world_size = store, rank, world_size
        local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
        # Rank 0, and the ranks before this one on its node; launchers count node by node.
        first = rank - int(local_rank) if local_rank.isdecimal() else rank
        self._lower_ranks = {0, *range(max(0, first), rank)}
        self.timeout, self.logs = timeout, logs
        self._report_interval = min(5.0, max(0.2, timeout / 8))
        # Seconds within which a rank that is alive, stuck or not, reports.
        self._report_timeout = max(_GRACE, 3 * self._report_interval)
        # Seconds between two requests; all ranks ask one store.
        self._poll_interval = max(0.05, world_size / 1000)
        self._where, self._last_heartbeat = "start", time.monotonic()
        self._patience, self._is_dumped = timeout, False
        # The processes of these and the first failure, seen while rank 0 lived: its process serves
        # the store if the launcher does not.
        self._lower_processes: dict[int, str] = {}
        self._seen_failure: Failure | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def heartbeat(self, where: str, timeout: float = 0.0) -> None:
        """Note that the main thread reached ``where``. Local and cheap.

        timeout: seconds that what begins there may take, if that is more than the usual timeout.
        Ranks that wait for this one still give up after theirs.
        """
        self._where, self._last_heartbeat, self._is_dumped = where, time.monotonic(), False
        self._patience = max(self.timeout, timeout)

    def close(self) -> None:
        """Stop the thread."""
        self._end.set()
        self._thread.join()

    def publish_failure(self, kind: str, text: str) -> None:
        """Publish what happened to this rank: ``failed``, ``waits`` or ``stuck``.

        The first rank that failed or is stuck has a key of its own, so that a reader needs one
        request, not one a rank.
        """
        report = json.dumps([self.rank, kind, host_and_pid(), text])
        with suppress(Exception):
            # The store is gone when rank 0 is.
            if kind != "waits":
                self.store.compare_set("first_failure", "", report)
            self.store.set(f"failure/{self.rank}", report)
            self.store.add("num_failures", 1)

    def publish_own_error(self, text: str) -> None:
        """Publish why this rank ends; the one that serves the store waits for the others."""
        self.publish_failure("failed", text)
        if self.rank == 0:
            # Long enough for the others' threads to read it before the store ends.
            deadline = time.monotonic() + _GRACE + self._report_interval
            with suppress(Exception):
                while time.monotonic() < deadline and self._num_failures() < self.world_size:
                    time.sleep(self._poll_interval)

    def find_cause(self, error: BaseException) -> RankError | None:
        """Return why a collective broke on this rank, as far as the ranks report.

        None: no other rank failed, so the error is this rank's own.
        """
        self.publish_failure("waits", str(error))
        try:
            failure, reports = self._first_failure(), {}
            if failure is None:
                reports = self._heartbeats()
                failure = self._wait_for_first_failure()
            if failure is not None:
                return None if failure[0] == self.rank else self._rank_error(failure)
            ranks = range(self.world_size)
            silent = [rank for rank in ranks if not self.store.check([f"failure/{rank}"])]
            if not silent:
                return None
            is_first = self.rank == min(rank for rank in ranks if rank not in silent)
            return RankError(self._describe_silent(silent, reports), is_reported_here=is_first)
        except Exception:
            if self._seen_failure is not None:
                return self._rank_error(self._seen_failure)
            rank0, others = self._lower_processes.get(0), self._lower_processes.copy()
            others.pop(0, None)
            return RankError(
                f"rank 0{f' on {rank0}' if rank0 else ''} has died or is unreachable, and with it"
                " the store that says who failed",
                # Who lives on other nodes is not known: rank 0's whole node may be gone.
                is_reported_here=not any(map(is_alive_here, others.values())),
            )

    def _rank_error(self, failure: Failure) -> RankError:
        rank, kind, host, text = failure
        verb = "failed" if kind == "failed" else "makes no progress"
        return RankError(
            f"rank {rank} on {host} {verb}: {text}",
            # Rank 0 prints why it failed, and ends without a word where it was stuck.
            is_reported_here=self.rank == 1 and rank == 0 and kind != "failed",
        )

    def _wait_for_first_failure(self) -> Failure | None:
        """Return None when all ranks wait, or after a timeout."""
        deadline = time.monotonic() + self._report_timeout
        while time.monotonic() < deadline:
            if (failure := self._first_failure()) is not None:
                return failure
            if self._num_failures() >= self.world_size:
                break
            time.sleep(self._poll_interval)
        return None

    def _first_failure(self) -> Failure | None:
        if not self.store.check(["first_failure"]):
            return None
        rank, kind, host, text = json.loads(self.store.get("first_failure"))
        return rank, kind, host, text

    def _num_failures(self) -> int:
        return int(self.store.add("num_failures", 0))

    def _heartbeats(self) -> dict[int, Any]:
        """Return the last heartbeat of every rank that has sent one."""
        return {
            rank: json.loads(self.store.get(f"heartbeat/{rank}"))
            for rank in range(self.world_size)
            if self.store.check([f"heartbeat/{rank}"])
        }

    def _describe_silent(self, ranks: list[int], before: dict[int, Any]) -> str:
        """Describe ranks that report no failure by their heartbeats ``before`` and now."""
        now = self._heartbeats()
        lines = []
        for rank in ranks:
            if rank not in now:
                lines.append(f"rank {rank} is unreachable")
                continue
            host, where, idle, number = now[rank]
            is_alive = rank in before and number != before[rank][3]
            state = f"has been at {where} for {idle:.0f} s" if is_alive else "has died"
            lines.append(f"rank {rank} on {host} {state}; its last report was from {where}")
        return "; ".join(lines) + ". Its own output, or its stacks in logs/, may say why"

    def _run(self) -> None:
        number, host = 0, host_and_pid()
        while number == 0 or not self._wait_for_next_report():
            number += 1
            idle = time.monotonic() - self._last_heartbeat
            with suppress(Exception):
                report = [host, self._where, round(idle, 1), number]
                self.store.set(f"heartbeat/{self.rank}", json.dumps(report))
                self._find_lower_processes()
                if self._seen_failure is None:
                    self._seen_failure = self._first_failure()
                if idle > self.timeout:
                    self._handle_stuck(idle)

    def _wait_for_next_report(self) -> bool:
        """Wait until the next heartbeat is due; return whether the watchdog is closed.

        Lower ranks that start later than this one are found at once, not an interval later: one of
        them may die before.
        """
        deadline = time.monotonic() + self._report_interval
        while len(self._lower_processes) < len(self._lower_ranks):
            if self._end.wait(self._poll_interval):
                return True
            if time.monotonic() >= deadline:
                return False
            with suppress(Exception):
                self._find_lower_processes()
        return self._end.wait(max(0.0, deadline - time.monotonic()))

    def _find_lower_processes(self) -> None:
        for rank in self._lower_ranks:
            if rank not in self._lower_processes and self.store.check([f"heartbeat/{rank}"]):
                report = json.loads(self.store.get(f"heartbeat/{rank}"))
                self._lower_processes[rank] = report[0]

    def _handle_stuck(self, idle: float) -> None:
        """Write the stacks; end the process where others wait for it, which may be for ever."""
        # A rank that itself waits in a collective began to do so after its heartbeat, and hears of
        # it that much later than others: at most another timeout, if it waits for one that failed.
        margin = self._report_timeout / 3 if self._seen_failure is None else self.timeout
        is_awaited = (
            idle > self.timeout + margin
            and self._num_failures() > 0
            and not self.store.check([f"failure/{self.rank}"])
        )
        if not self._is_dumped and (is_awaited or idle > self._patience):
            self._is_dumped = True
            self._dump_stacks(idle)
        if is_awaited:
            text = f"at {self._where} for {idle:.0f} s, in {self._main_frame()}"
            self.publish_failure("stuck", text)
            if self.rank == 0:
                # The store ends with this process, and the others are reading it.
                time.sleep(_GRACE)
            os._exit(1)

    def _dump_stacks(self, idle: float) -> None:
        text = (
            f"rank {self.rank} has made no progress since {self._where} for {idle:.0f} s;"
            " its threads:"
        )
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
def run_watchdog(ranks: Ranks, timeout: float, logs: Path | None) -> Iterator[Watchdog | None]:
    """Watch this rank for the length of the block; None with one process.

    An error inside is published to the other ranks. One that comes from another rank names it.

    Raises:
        RankError: a collective broke because of another rank.
        TrainingError: out of memory.
        BaseException: this rank's own error, unchanged.
    """
    watchdog = None
    if ranks.store is not None and ranks.world_size > 1:
        # A connection of its own: the main thread may be waiting on the other one.
        store = ranks.store.clone()  # type: ignore[attr-defined]
        watchdog = Watchdog(store, ranks.rank, ranks.world_size, timeout, logs)
    try:
        yield watchdog
    except BaseException as error:
        own = _out_of_memory(error) or error
        if watchdog is not None:
            if _is_broken_collective(error) and (cause := watchdog.find_cause(error)) is not None:
                raise cause from error
            if not isinstance(error, RankError):
                watchdog.publish_own_error(format_error(own))
        if own is not error:
            raise own from error
        raise
    finally:
        if watchdog is not None:
            watchdog.close()


def _is_broken_collective(error: BaseException | None) -> bool:
    """Whether ``error`` or a cause of it is a broken collective."""
    if error is None:
        return False
    is_broken = isinstance(error, dist.DistError)
    if isinstance(error, RuntimeError | CheckpointError):
        is_broken = is_broken or any(text in str(error) for text in _BROKEN_COLLECTIVE)
    return is_broken or _is_broken_collective(error.__cause__)


def _out_of_memory(error: BaseException) -> TrainingError | None:
    """Return what tells the user about an out-of-memory error; None for another error."""
    is_own = isinstance(error, MemoryError | torch.OutOfMemoryError)
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    if not is_own and "can't allocate memory" not in str(error):
        return None
    return TrainingError(
        f"out of memory: {first_line}\n"
        "remedy: set strategy.activation_checkpointing=full, or strategy=fsdp on more processes; or"
        " lower batch.micro_batch_size, which changes results by rounding only (a model whose"
        " layers depend on the whole micro-batch cannot resume with another:"
        " docs/reference/runs.md)"
    )
