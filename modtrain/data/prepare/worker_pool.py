"""Jobs in several processes that start clean and end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from modtrain.common.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")


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
    # Spawned: a fork of a process with threads (arrow, tokenizers) can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker) as pool:
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
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    # One worker a CPU: threads inside them would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches the whole group; the parent answers for all.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, workers of a killed parent would wait for ever for their next job."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
