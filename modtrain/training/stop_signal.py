"""What asks a run to stop: signals, and a limit of time. A run looks between two steps.

A signal's handler only sets a flag, and says so after Ctrl-C.

Imported before torch and Lightning, so that a signal during their slow imports is not lost.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A bar goes on in the line below.
_STOPPING = b"\nstops once this step is done and saved; Ctrl-C again ends it at once, unsaved\n"
_SHOW_CURSOR = b"\x1b[?25h"
# The variables in which a job's script gives the seconds between a signal and the kill: before the
# time limit, and at a preemption.
_TIME_LEFT: dict[int, str] = {signal.SIGUSR1: "MODTRAIN_LEAD", signal.SIGTERM: "MODTRAIN_GRACE"}


class StopRequest:
    """Remembers the first stop signal; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._since = 0.0
        self._deadline: float | None = None

    def install(self) -> None:
        """Install the handlers. May be called again after others have been installed."""
        for signum in STOP_SIGNALS:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            show_cursor(b"\n")
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        if self.signum is None:
            self.signum = signum
            self._since = time.monotonic()
            if signum == signal.SIGINT and os.environ.get("RANK", "0") == "0":
                _write_to_terminal(_STOPPING)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until this process is killed, None if unknown."""
        seconds = os.environ.get(_TIME_LEFT.get(self.signum or 0, ""), "")
        if not seconds.isdecimal():
            return None
        return int(seconds) - (time.monotonic() - self._since)

    @property
    def requested(self) -> bool:
        """Whether a stop was requested."""
        return self.signum is not None or self.is_out_of_time

    @property
    def is_out_of_time(self) -> bool:
        """Whether the limit of time has passed."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    @contextmanager
    def time_limit(self, seconds: float | None) -> Iterator[None]:
        """Ask for a stop once the block has taken ``seconds``; the outermost limit holds."""
        if seconds is None or self._deadline is not None:
            yield
            return
        self._deadline = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadline = None

    def expire(self) -> None:
        """Let the limit of time pass: another rank's has."""
        self._deadline = time.monotonic()

    def pause(self, seconds: float) -> None:
        """Sleep for ``seconds``, or until a stop is requested."""
        until = time.monotonic() + seconds
        while not self.requested and time.monotonic() < until:
            time.sleep(0.2)

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as shells expect; else 75 (EX_TEMPFAIL): run again."""
        return 130 if self.signum == signal.SIGINT else 75

    @property
    def name(self) -> str:
        """The signal's name, or that of the limit."""
        if self.signum is not None:
            return signal.Signals(self.signum).name
        return "max_time" if self.is_out_of_time else "none"


def show_cursor(end: bytes = b"") -> None:
    """Restore what an interrupted progress bar has hidden on the terminal. end: written behind."""
    _write_to_terminal(_SHOW_CURSOR + end)


def _write_to_terminal(text: bytes) -> None:
    """Write ``text`` to the terminal, if there is one.

    Not through a stream, which may be in the middle of a write.
    """
    for number in (1, 2):
        with suppress(OSError):
            if os.isatty(number):
                os.write(number, text)
                return


STOP = StopRequest()
"""The process's stop request: signals belong to the process as a whole."""
