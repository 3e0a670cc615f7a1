"""Progress of a long job: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

_log = logging.getLogger(__name__)
_LOG_EVERY = 0.1

Advance = Callable[[int], None]


@contextmanager
def progress_over(label: str, total: int, shown: bool) -> Iterator[Advance]:
    """Yield a function that takes each number of bytes done, of ``total`` in all."""
    console = Console(stderr=True)
    if not shown:
        yield lambda _: None
    elif console.is_terminal:
        columns = TextColumn(label), BarColumn(), DownloadColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done: bar.advance(task, done)
    else:
        yield _LogLines(label, total).advance


class _LogLines:
    """A line at each tenth of the work."""

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._next = _LOG_EVERY

    def advance(self, done: int) -> None:
        self._done += done
        share = self._done / self._total if self._total else 1.0
        if share >= self._next:
            # Sharper rounding would write 100% before the end.
            _log.info("%s: %d%% of %.1f MB", self._label, int(share * 100), self._total / 1_000_000)
            self._next = share + _LOG_EVERY
