"""A job in a process of its own, so that its crash does not end the sweep, and its state.

Its memory is also released for the next job, and signal handlers are per process. The process is
forked: the parent has imported neither torch nor CUDA, which cannot be forked once they have
started threads.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

from modtrain.common.atomic_io import is_locked, write_text
from modtrain.common.errors import ModtrainError
from modtrain.common.reading import UnreadableError, read_json
from modtrain.common.terminal import print_line
from modtrain.training.metric_names import PROGRESS_MARK
from modtrain.training.run_directory import RunDirectory
from modtrain.training.stop_signal import STOP

STATES = ("complete", "running", "failed", "pruned", "stopped", "not started")
FAILURE, PRUNED = "failure.json", "PRUNED"
"""Files of a run: why its job failed, and the mark of one that a search has pruned."""
JOB_LOG = "job.log"
_CONTEXT = multiprocessing.get_context("fork")
_POLL_SECONDS = 0.1
_MOST_READ = 1 << 16
# A job whose sweep was killed saves and ends; a new sweep may start meanwhile.
LOCK_TIMEOUT = 60.0
EXIT_RESUMABLE = 75


def run_in_process(run: RunDirectory, work: Callable[[], int], main_pid: int | None = None) -> int:
    """Call ``work`` in a process of its own and return its exit code.

    Its output goes to ``logs/job.log`` of ``run``, its progress here as well, the reason of a
    failure to ``failure.json``. A stop signal to this process is forwarded to it, and it stops when
    this process dies.

    main_pid: the process whose end stops the job too, if not this one.

    Returns:
        0 for a complete run, 75 or 130 for a resumable one, else the exit code of a failed one.
    """
    deadline = time.monotonic() + LOCK_TIMEOUT
    while is_in_use(run) and time.monotonic() < deadline and not STOP.requested:
        time.sleep(_POLL_SECONDS)
    if STOP.requested:
        return STOP.exit_code
    if is_in_use(run):
        return EXIT_RESUMABLE
    run.logs.mkdir(parents=True, exist_ok=True)
    (run.path / FAILURE).unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child = _CONTEXT.Process(target=_run_child, args=(run, work))
    progress = ProgressLines(run.logs / JOB_LOG)
    child.start()
    while child.is_alive():
        child.join(_POLL_SECONDS)
        progress.forward()
        if not STOP.requested and main_pid not in (None, os.getpid(), os.getppid()):
            STOP.signum = signal.SIGTERM
        if STOP.requested and child.pid is not None and child.is_alive():
            # Not as SIGINT: a second one ends a run at once. Repeating the others does no harm.
            is_usr1 = STOP.signum == signal.SIGUSR1
            os.kill(child.pid, signal.SIGUSR1 if is_usr1 else signal.SIGTERM)
    progress.forward()
    return _record_end(run, child.exitcode or 0)


class ProgressLines:
    """Forwards the lines of a job's log that tell its step, from now on.

    A job's output goes to its log; the one who started it wants to see that something goes on.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._rest = path, b""
        self._offset = path.stat().st_size if path.is_file() else 0

    def forward(self) -> None:
        """Print the lines that were added since the last call."""
        with suppress(OSError), self._path.open("rb") as log:
            log.seek(self._offset)
            added = log.read(_MOST_READ)
            self._offset += len(added)
            *lines, self._rest = (self._rest + added).split(b"\n")
            for line in lines:
                if PROGRESS_MARK.encode() in line:
                    print_line(line.decode(errors="replace"))


def _record_end(run: RunDirectory, code: int) -> int:
    """Record a failure that the process could not record itself."""
    is_recorded = (run.path / FAILURE).is_file() or run.is_complete
    if code in (0, EXIT_RESUMABLE, 130) or is_recorded:
        return code
    if code < 0:
        name = signal.Signals(-code).name
        hint = ": perhaps out of memory" if -code == signal.SIGKILL else ""
        write_failure(run, "killed", f"the process was killed by {name}{hint}")
    else:
        write_failure(run, "ended", f"the process ended with exit code {code}")
    return code


def _run_child(run: RunDirectory, work: Callable[[], int]) -> None:
    # A process group of its own: the sweep forwards a terminal's Ctrl-C, once.
    os.setpgid(0, 0)
    STOP.install()
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    # Line-buffered: the output of a killed job is kept.
    with (run.logs / JOB_LOG).open("a", buffering=1) as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        sys.stdout = sys.stderr = log
        sys.exit(_call(run, work))


def _call(run: RunDirectory, work: Callable[[], int]) -> int:
    try:
        return work()
    except BaseException as error:
        if is_in_use(run):
            # Another process has acquired the run's lock first.
            return EXIT_RESUMABLE
        traceback.print_exc()
        write_failure(run, type(error).__name__, str(error) or repr(error))
        return error.exit_code if isinstance(error, ModtrainError) else 1


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def state_of(run: RunDirectory) -> str:
    """Return one of `STATES`; ``stopped``: started, not complete, and no process works on it."""
    if run.is_complete:
        return "complete"
    if is_in_use(run):
        return "running"
    if (run.path / FAILURE).is_file():
        return "failed"
    if (run.path / PRUNED).is_file():
        return "pruned"
    return "stopped" if run.config.is_file() else "not started"


def is_in_use(run: RunDirectory) -> bool:
    """Whether a process works in the run's directory."""
    return is_locked(run.path / ".lock")


def write_failure(run: RunDirectory, kind: str, text: str) -> None:
    """Record why the job failed. kind: the error's class, or how the process ended."""
    run.path.mkdir(parents=True, exist_ok=True)
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    failure = {"kind": kind, "text": text, "time": time}
    write_text(run.path / FAILURE, json.dumps(failure, indent=1) + "\n")


def failure_text(run: RunDirectory) -> str:
    """Return the kind and the text of the failure; empty without one."""
    try:
        failure = read_json(run.path / FAILURE)
        return f"{failure['kind']}: {failure['text']}"
    except (UnreadableError, KeyError):
        return ""
