"""How a command ends and prints where it is one of several processes, interrupted, or not read."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping

from modtrain.common.errors import ConfigError
from modtrain.distributed.launch import Launch


def print_all_characters() -> None:
    """Print what the terminal's encoding lacks as an escape: a file's name may be in another."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and stream.errors == "strict":
            reconfigure(errors="backslashreplace")


def launched_rank(has_ranks: bool, environment: Mapping[str, str] = os.environ) -> int:
    """Return the rank of this process among those that were started together, 0 without others.

    has_ranks: whether the verb runs on several ranks. One that does not is alone, whatever a
    container's environment says, unless torchrun or srun really started several of it.
    """
    num_tasks = environment.get("SLURM_NTASKS", "1") if "SLURM_STEP_ID" in environment else "1"
    if not has_ranks and "TORCHELASTIC_RUN_ID" not in environment and num_tasks == "1":
        return 0
    try:
        return Launch.from_environment(environment).rank
    except ConfigError:
        # The environment itself is wrong: each process says so.
        return 0


def ignore_interrupts() -> None:
    """Let a further Ctrl-C do nothing: this one ends the process, and needs no traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def interrupted_text(is_resumable: bool) -> str:
    """Return what is printed after Ctrl-C. is_resumable: whether finished work is kept."""
    return "interrupted: the same command resumes" if is_resumable else "interrupted"
