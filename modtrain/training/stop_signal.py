"""Signals that ask a run to stop. A handler only sets a flag; the run looks at it between steps.

Imported before torch and Lightning, so that a signal in the seconds of their imports is not lost.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# What a job's script says of the seconds between a signal and the end: before the time limit, and
# where the job is preempted.
_TIME_LEFT: dict[int, str] = {signal.SIGUSR1: "MODTRAIN_LEAD", signal.SIGTERM: "MODTRAIN_GRACE"}


class StopRequest:
    """Remembers the first stop signal; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._since = 0.0

    def install(self) -> None:
        """Take the stop signals over. May be called again, after others have set handlers."""
        for signum in STOP_SIGNALS:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        if self.signum is None:
            self.signum = signum
            self._since = time.monotonic()

    @property
    def seconds_left(self) -> float | None:
        """How long this process has before it is ended; None: nobody said."""
        name = _TIME_LEFT.get(self.signum or 0)
        said = os.environ.get(name, "") if name else ""
        if not said.isdecimal():
            return None
        return int(said) - (time.monotonic() - self._since)

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self.signum is not None

    def pause(self, seconds: float) -> None:
        """Sleep for as long, or until a stop is asked for."""
        until = time.monotonic() + seconds
        while not self.requested and time.monotonic() < until:
            time.sleep(0.2)

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as shells expect; else 75, which means: run me again."""
        return 130 if self.signum == signal.SIGINT else 75

    @property
    def name(self) -> str:
        """The signal's name."""
        return signal.Signals(self.signum).name if self.signum is not None else "none"


STOP = StopRequest()
"""The process's stop request: signals belong to the process as a whole."""
