"""A job in a process of its own, so that what ends it ends nothing else.

A crash of one job must not end the sweep, its memory must not stay for the next one, and signal
handlers belong to a process as a whole. The process is forked: the one that forks has imported
neither torch nor CUDA, which do not bear it once they have started threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait

from modtrain.common.errors import ModtrainError
from modtrain.experiments.sweep.job_state import failure_path, is_in_use, state_of, write_failure
from modtrain.training.run_directory import RunDirectory
from modtrain.training.stop_signal import STOP

_CONTEXT = multiprocessing.get_context("fork")
_POLL_SECONDS = 0.1
# A job whose sweep was killed saves and ends; a new sweep may come while it does.
LOCK_TIMEOUT = 60.0
EXIT_RESUMABLE = 75
_FORWARDED_SIGNALS = {signal.SIGUSR1: signal.SIGUSR1}


def run_in_process(run: RunDirectory, work: Callable[[], int], main_pid: int | None = None) -> int:
    """Call ``work`` in a process of its own and return its exit code.

    What it prints goes to ``logs/job.log`` of ``run``; why it failed, to ``failure.json``. A stop
    signal to this process is handed on to it, and when this process dies it stops as well.

    main_pid: the process whose end is to stop the job too, where that is not this one.

    Returns:
        0, 75 or 130 where the run is complete or can go on, or else what a failed one ended with.
    """
    deadline = time.monotonic() + LOCK_TIMEOUT
    while is_in_use(run) and time.monotonic() < deadline and not STOP.requested:
        time.sleep(_POLL_SECONDS)
    if STOP.requested:
        return STOP.exit_code
    if is_in_use(run):
        return EXIT_RESUMABLE
    run.logs.mkdir(parents=True, exist_ok=True)
    failure_path(run).unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child = _CONTEXT.Process(target=_run_child, args=(run, work))
    child.start()
    while child.is_alive():
        child.join(_POLL_SECONDS)
        if not STOP.requested and _is_orphan(main_pid):
            STOP.signum = signal.SIGTERM
        if STOP.requested and child.pid is not None and child.is_alive():
            # Not as a Ctrl-C: of those the second one ends a run at once. Again does no harm.
            os.kill(child.pid, _FORWARDED_SIGNALS.get(STOP.signum or 0, signal.SIGTERM))
    return _record_end(run, child.exitcode or 0)


def _is_orphan(main_pid: int | None) -> bool:
    return main_pid not in (None, os.getpid(), os.getppid())


def _record_end(run: RunDirectory, code: int) -> int:
    """Write down a failure that the process could not tell by itself."""
    if (
        code in (0, EXIT_RESUMABLE, 130)
        or failure_path(run).is_file()
        or state_of(run) == "complete"
    ):
        return code
    if code < 0:
        name = signal.Signals(-code).name
        hint = ": out of memory, perhaps" if -code == signal.SIGKILL else ""
        write_failure(run, "killed", f"the process was ended by {name}{hint}")
    else:
        write_failure(run, "ended", f"the process ended with exit code {code}")
    return code


def _run_child(run: RunDirectory, work: Callable[[], int]) -> None:
    # A group of its own: a terminal's Ctrl-C comes by way of the sweep, once.
    os.setpgid(0, 0)
    STOP.install()
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    # Lines as they come: a job that is killed has said what it said.
    with (run.logs / "job.log").open("a", buffering=1) as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        sys.stdout = sys.stderr = log
        sys.exit(_call(run, work))


def _call(run: RunDirectory, work: Callable[[], int]) -> int:
    try:
        return work()
    except BaseException as error:
        if is_in_use(run):
            # Another process was quicker by a moment.
            return EXIT_RESUMABLE
        traceback.print_exc()
        write_failure(run, type(error).__name__, str(error) or repr(error))
        return error.exit_code if isinstance(error, ModtrainError) else 1


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
