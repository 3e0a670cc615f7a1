"""The state of a job of a sweep or a search, read from its directory."""

from __future__ import annotations

import datetime
import json

from modtrain.common.atomic_io import is_locked, write_text
from modtrain.training.run_directory import RunDirectory

STATES = ("complete", "running", "failed", "pruned", "stopped", "not started")
FAILURE, PRUNED = "failure.json", "PRUNED"
"""Files of a run: why its job failed, and the mark of one that a search has pruned."""


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
        failure = json.loads((run.path / FAILURE).read_text())
    except (OSError, ValueError):
        return ""
    return f"{failure['kind']}: {failure['text']}"
