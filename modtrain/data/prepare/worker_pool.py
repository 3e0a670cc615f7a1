"""Jobs in several processes that start clean and end with their parent, and their progress."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import TypeVar

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from modtrain.common.errors import DataError
from modtrain.common.shared_memory import SHARED_MEMORY
from modtrain.common.terminal import plain_console

Job = TypeVar("Job")
Result = TypeVar("Result")

_log = logging.getLogger(__name__)
# A log line at each tenth of the work.
_LOG_EVERY = 0.1
# What making one fails with where that is full, or may not be written.
_NO_SHARED_MEMORY = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS)


def run_unfinished(
    label: str,
    function: Callable[[Job], Result],
    finished: Callable[[Job], Result | None],
    jobs: Sequence[Job],
    sizes: Sequence[int],
    num_workers: int,
    progress: bool,
    elsewhere: Elsewhere | None = None,
) -> list[Result]:
    """Return the result of each job, in order; what an earlier run ``finished`` is not run again.

    sizes: bytes of each job, for the ``progress``, which ``label`` names. num_workers: as in
    `run_jobs`. elsewhere: jobs of other processes, for the progress over all.
    """
    others = elsewhere or Elsewhere(0, lambda: 0)
    results = {number: result for number, job in enumerate(jobs) if (result := finished(job))}
    open_numbers = [number for number in range(len(jobs)) if number not in results]
    own = sum(sizes[number] for number in results)
    total = sum(sizes) + others.num_bytes
    with _progress_over(label, total, own + others.num_done(), progress) as update:
        open_jobs = [jobs[number] for number in open_numbers]
        for done, result in run_jobs(function, open_jobs, num_workers):
            results[open_numbers[done]] = result
            own += sizes[open_numbers[done]]
            update(own + others.num_done())
    return [results[number] for number in range(len(jobs))]


@dataclass(frozen=True)
class Elsewhere:
    """Work of other processes: its bytes, and a function that counts those that are done."""

    num_bytes: int
    num_done: Callable[[], int]


@contextmanager
def _progress_over(
    label: str, total: int, initial: int, shown: bool
) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the bytes done so far, of ``total`` in all.

    Shows a bar on a terminal, log lines elsewhere. initial: bytes that were done before.
    """
    console = plain_console(stderr=True)
    if not shown:
        yield lambda _: None
    elif console.is_terminal:
        columns = (
            TextColumn(label, markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(label, total=total, completed=initial)
            yield lambda done: bar.update(task, completed=done)
    else:
        start, next_share = time.monotonic(), _LOG_EVERY

        def update(done: int) -> None:
            nonlocal next_share
            share = done / total if total else 1.0
            if share >= next_share:
                # Sharper rounding would write 100% before the end.
                text = f"{int(share * 100)}% of {total / 1e6:.1f} MB"
                if rate := (done - initial) / max(1e-9, time.monotonic() - start):
                    left = timedelta(seconds=round((total - done) / rate))
                    text += f", {rate / 1e6:.1f} MB/s, {left} left"
                _log.info("%s: %s", label, text)
                next_share = share + _LOG_EVERY

        update(initial)
        yield update


def usable_cpus() -> int:
    """CPUs that this process may run on, which on a shared node are not all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], num_workers: int
) -> Iterator[tuple[int, Result]]:
    """Yield (number of the job, its result) as the jobs end, in any order.

    num_workers: processes; 0 is every usable CPU, 1 works in this process.
    Raises what a job raises; the jobs not yet started are then dropped.
    """
    num_workers = min(num_workers or usable_cpus(), len(jobs))
    if num_workers <= 1:
        for number, job in enumerate(jobs):
            yield number, function(job)
        return
    with _pool(num_workers) as (pool, end_workers):
        futures: dict[Future[Result], int] = {
            pool.submit(function, job): number for number, job in enumerate(jobs)
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died, most likely for lack of memory. What was finished is "
                "kept: run prepare again, with fewer num_workers."
            ) from error
        except BaseException:
            # Their work would go on for minutes after Ctrl-C, and count for nothing.
            end_workers()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _pool(num_workers: int) -> Iterator[tuple[ProcessPoolExecutor, Callable[[], None]]]:
    """Yield worker processes, and a function that ends them in the middle of what they do.

    Raises:
        DataError: the locks between them cannot be made.
    """
    # Spawned: a fork of a process with threads (arrow, tokenizers) can deadlock.
    context = multiprocessing.get_context("spawn")
    # The workers hold the one end and see when the other one is closed, also by the parent's death.
    reader, writer = context.Pipe(duplex=False)
    with reader, writer:
        try:
            pool = ProcessPoolExecutor(num_workers, context, _start_worker, (reader,))
        except OSError as error:
            if error.errno not in _NO_SHARED_MEMORY:
                raise
            raise DataError(
                f"{SHARED_MEMORY}: {error.strerror}, and the workers' locks are there\n"
                "remedy: free space there, give a container --shm-size=1g, or add num_workers=1,"
                " which needs no locks; the same command continues"
            ) from error
        with pool:
            yield pool, writer.close


def _start_worker(parent: Connection) -> None:
    # One worker a CPU: threads inside them would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches the whole group; the parent answers for all.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: Connection) -> None:
    """Without this, workers of a killed parent would wait for ever for their next job."""
    with suppress(EOFError, OSError):
        # Nothing is ever sent: the end of the connection is what comes.
        parent.recv_bytes()
    os._exit(1)
