"""What became of a process, told to the script that started it. Imports nothing heavy.

Between a rank and the script stand srun or torchrun, which have one exit code for many failures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modtrain.common.errors import ModtrainError

OUTCOME = "MODTRAIN_OUTCOME"
"""The variable that names the file: the exit code on its first line, the reason on its second."""


class Outcome:
    """What the block comes to; its user sets the exit code."""

    exit_code = 0


@contextmanager
def told() -> Iterator[Outcome]:
    """Write what the block came to into the file that the environment names, if it names one.

    Rank 0 writes; one file is enough, and a rank whose peer failed knows who and why.
    """
    outcome, reason = Outcome(), ""
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
