"""Batches read by threads ahead of the step that wants them, in their order."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")
B = TypeVar("B")
MOST_THREADS = 16
"""Batches that are requested at once. They wait for a server most of their time."""
# Seconds that the end waits for requests that were cancelled, and between two looks.
_LONGEST_END, _LOOK = 5.0, 0.05
# The share of the batches read ahead that have come, while the server is fast enough.
_ENOUGH = 0.5
log = logging.getLogger(__name__)


class ReadAhead(Generic[T, B]):
    """``read(request)`` of each request, in order; iterated over once.

    An error of ``read`` is raised in the place of its result.
    """

    def __init__(
        self,
        read: Callable[[T], B],
        requests: Iterator[T],
        num_ahead: int,
        cancel: Callable[[Collection[int]], None],
    ) -> None:
        """num_ahead: results under way or waiting; at most MOST_THREADS are under way.

        cancel: breaks off what threads of these identifiers wait for, so that the end does not.
        """
        self._read, self._requests = read, requests
        self._num_ahead, self._cancel = num_ahead, cancel
        self._coming: deque[Future[B]] = deque()
        self._threads: set[int] = set()

    @property
    def is_behind(self) -> bool:
        """Whether few of the results that are read ahead have come: the server is slow.

        It may be asked by any thread.
        """
        coming = tuple(self._coming)
        return sum(future.done() for future in coming) < _ENOUGH * len(coming)

    def __iter__(self) -> Iterator[B]:
        threads = ThreadPoolExecutor(min(self._num_ahead, MOST_THREADS), "read-ahead")
        coming = self._coming
        try:
            first = islice(self._requests, self._num_ahead)
            coming.extend(threads.submit(self._result, request) for request in first)
            while coming:
                result = coming[0].result()
                coming.popleft()
                for request in islice(self._requests, 1):
                    coming.append(threads.submit(self._result, request))
                yield result
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            self._end()

    def _result(self, request: T) -> B:
        self._threads.add(threading.get_ident())
        return self._read(request)

    def _end(self) -> None:
        """Break off what is under way; an error must not wait for a server that is silent."""
        deadline = time.monotonic() + _LONGEST_END
        left = {future for future in self._coming if not future.done()}
        self._coming.clear()
        while left and time.monotonic() < deadline:
            # Again: a thread may have been between two requests.
            self._cancel(frozenset(self._threads))
            left = wait(left, _LOOK).not_done
        if left:
            log.warning("%d requests to the server still go on", len(left))
