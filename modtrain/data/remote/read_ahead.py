"""Batches read by threads ahead of the step that wants them, in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
B = TypeVar("B")
# They wait for a server most of their time.
_MOST_THREADS = 16


def read_ahead(read: Callable[[T], B], requests: Iterator[T], num_ahead: int) -> Iterator[B]:
    """Yield ``read(request)`` for each request, in order, with ``num_ahead`` of them under way.

    An error of ``read`` is raised in the place of its result.
    """
    threads = ThreadPoolExecutor(min(num_ahead, _MOST_THREADS), "read-ahead")
    try:
        first = islice(requests, num_ahead)
        coming: deque[Future[B]] = deque(threads.submit(read, request) for request in first)
        while coming:
            result = coming.popleft().result()
            for request in islice(requests, 1):
                coming.append(threads.submit(read, request))
            yield result
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
