"""`modtrain wait`: returns when a run is complete, has failed for good, or is left by its jobs."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence

from modtrain.cluster import slurm
from modtrain.cluster.config import WaitConfig
from modtrain.cluster.runs import RunNotFoundError, RunRecord, existing_run, read_run
from modtrain.cluster.slurm import SlurmError
from modtrain.cluster.status import RunState, ask_slurm, state_of
from modtrain.common.errors import raise_if_any
from modtrain.training.run_listing import find_runs

COMPLETE, FAILED, STOPPED, TIMED_OUT = 0, 1, 75, 124
"""Exit codes. The last one is that of the command ``timeout``."""
_AT_WORK = ("running", "pending")
# Looks in a row at which nothing is at work: between two jobs there may be a moment without one.
_LOOKS = 2

Print = Callable[[str], None]


def wait_for_run(config: WaitConfig, print_line: Print | None = None) -> int:
    """Wait until nothing works on the run any more, nor on those below it; return the exit code.

    0: complete; 1: one has failed, and is not restarted; 75: one was stopped or cancelled, or has
    never started; 124: it has taken too long.

    Raises:
        ConfigError: the request is invalid.
        RunNotFoundError: there is no such run.
        SlurmError: the run has jobs, and Slurm is not available here.
    """
    raise_if_any(config.problems())
    print_line = print_line or _print_to_stderr
    path = existing_run(config.runs_dir, str(config.run))
    until = None if config.timeout is None else time.monotonic() + config.timeout
    quiet, shown = 0, ""
    while True:
        runs = [read_run(one, str(one.relative_to(path.parent))) for one in find_runs(path)]
        if not runs:
            raise RunNotFoundError(f"{path} is no run, and has none below it")
        states = _states(runs)
        text = "Slurm does not answer" if states is None else _describe(runs, states)
        if text != shown:
            print_line(f"{path}: {text}")
            shown = text
        is_at_work = states is None or any(state.name in _AT_WORK for state in states)
        quiet = 0 if is_at_work else quiet + 1
        if states is not None and (quiet >= _LOOKS or _are_complete(runs, states)):
            return _exit_code(runs, states)
        if until is not None and time.monotonic() >= until:
            print_line(f"{path}: not ended within {config.timeout:g} s")
            return TIMED_OUT
        left = config.interval if until is None else until - time.monotonic()
        time.sleep(max(0.0, min(config.interval, left)))


def _print_to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def _states(runs: Sequence[RunRecord]) -> list[RunState] | None:
    """Return the runs' states, None where Slurm does not answer."""
    unfinished = [run for run in runs if not run.complete and run.submitted]
    if unfinished and not slurm.has_slurm():
        raise SlurmError(
            f"Slurm is not available here, and {unfinished[0].path} has jobs\n"
            "remedy: wait on a login node"
        )
    reply = ask_slurm(runs)
    if reply.error:
        return None
    return [state_of(run, reply.jobs) for run in runs]


def _are_complete(runs: Sequence[RunRecord], states: Sequence[RunState]) -> bool:
    own = [state for run, state in zip(runs, states, strict=True) if not run.is_group]
    return bool(own) and all(state.name == "complete" for state in states)


def _describe(runs: Sequence[RunRecord], states: Sequence[RunState]) -> str:
    if len(runs) == 1:
        reason = f": {states[0].reason}" if states[0].reason else ""
        return states[0].name + reason
    counts = Counter(
        state.name for run, state in zip(runs, states, strict=True) if not run.is_group
    )
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _exit_code(runs: Sequence[RunRecord], states: Sequence[RunState]) -> int:
    names = [state.name for state in states]
    if "failed" in names:
        return FAILED
    own = [state.name for run, state in zip(runs, states, strict=True) if not run.is_group]
    # A group without runs, such as a preparation, that has not failed.
    return COMPLETE if all(name == "complete" for name in own) else STOPPED
