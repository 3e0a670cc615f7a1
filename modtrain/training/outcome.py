"""How a process ended, in a file for the job's script. Imports nothing heavy.

srun and torchrun, which the script starts, have one exit code for many failures, and a process that
never came to run modtrain has written none: `slurm/outcome.sh` reads both from the files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from traceback import walk_tb

from modtrain.common.errors import ModtrainError, NodeError
from modtrain.distributed.launch import node_name

OUTCOME = "MODTRAIN_OUTCOME"
"""The variable that names the directory of the files ``rank-<rank>``, which have three lines: the
exit code, ``running`` before the end; the node's name, or those of the nodes that failed, parted by
commas; the reason."""
REQUIRED = (
    *("torch", "lightning", "hydra", "omegaconf", "yaml", "webdataset", "tensorboard"),
    *("tokenizers", "pyarrow", "zstandard", "numpy", "rich", "matplotlib", "scipy", "jinja2"),
    *("deepspeed", "hydra_plugins", "optuna", "plotly", "argcomplete", "braceexpand", "filelock"),
    *("fsspec", "tenacity"),
)
"""What modtrain's dependencies without extras are imported as. A container with modtrain's packages
need not have its metadata."""
# Tracebacks of extensions repeat their sources; the beginning and the end say what is wrong.
_MAX_REASON_CHARS = 4000


class ProcessOutcome:
    """The outcome of a block, which sets the exit code."""

    exit_code = 0


@contextmanager
def report_outcome() -> Iterator[ProcessOutcome]:
    """Write the block's outcome to this rank's file, if the environment names a directory.

    Processes that the block starts report nothing: the variable is removed.
    """
    outcome, reason, nodes = ProcessOutcome(), "", node_name()
    folder = os.environ.pop(OUTCOME, None)
    _write(folder, "running", nodes, "")
    try:
        yield outcome
    except BaseException as error:
        outcome.exit_code = _exit_code(error)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        nodes = ",".join(getattr(error, "nodes", ())) or nodes
        raise
    finally:
        _write(folder, str(outcome.exit_code), nodes, reason)


def _write(folder: str | None, state: str, nodes: str, reason: str) -> None:
    if not folder:
        return
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if len(reason) > _MAX_REASON_CHARS:
        half = _MAX_REASON_CHARS // 2
        reason = f"{reason[:half]} […] {reason[-half:]}"
    text = f"{state}\n{nodes}\n{reason}\n"
    with suppress(OSError):
        # A path in the reason may be of any bytes.
        (Path(folder) / f"rank-{rank}").write_text(text, encoding="utf-8", errors="replace")


def _exit_code(error: BaseException) -> int:
    if isinstance(error, ModtrainError):
        return error.exit_code
    if isinstance(error, ImportError) and _is_of_required_package(error):
        # The login node has what is missing here: it has checked the job.
        return NodeError.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1


def _is_of_required_package(error: ImportError) -> bool:
    """Whether what modtrain requires is missing or broken; else no machine may have it."""
    if (error.name or "").partition(".")[0] in ("modtrain", *REQUIRED):
        return True
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    # A package that fails while it is imported, for its binaries or for one that it needs itself.
    # In a function it may lack what is optional for it.
    if not frames or frames[-1].f_code.co_name != "<module>":
        return False
    return str(frames[-1].f_globals.get("__name__")).partition(".")[0] in REQUIRED
