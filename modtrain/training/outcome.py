"""The exit code and error of a process, in a file for the job's script. Imports nothing heavy.

srun and torchrun, which the script starts, have one exit code for many failures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modtrain.common.errors import ModtrainError

OUTCOME = "MODTRAIN_OUTCOME"
"""The variable that names the file: the exit code on its first line, the reason on its second."""


class ProcessOutcome:
    """The outcome of a block, which sets the exit code."""

    exit_code = 0


@contextmanager
def report_outcome() -> Iterator[ProcessOutcome]:
    """Write the block's outcome to the file that the environment names, if it names one.

    Rank 0 writes: its error names the rank that failed and the reason.
    """
    outcome, reason = ProcessOutcome(), ""
    try:
        yield outcome
    except BaseException as error:
        outcome.exit_code = _exit_code(error)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise
    finally:
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        path = os.environ.get(OUTCOME)
        if path and rank == "0":
            with suppress(OSError):
                Path(path).write_text(f"{outcome.exit_code}\n{reason[:500]}\n")


def _exit_code(error: BaseException) -> int:
    if isinstance(error, ModtrainError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
