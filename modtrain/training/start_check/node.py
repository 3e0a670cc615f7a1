"""What a process finds out about its own node."""

from __future__ import annotations

import errno
import os
import platform
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from modtrain.data.remote.urls import is_url
from modtrain.training.config import TrainConfig
from modtrain.training.run_directory import RunDirectory, package_versions

MARK = ".start-check-"
"""What the names of files begin with that the check leaves for a moment in ``logs/``."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Within which a network file system shows what another node has written.
_VISIBLE_SECONDS = 10.0


def device_problems(device_type: str, local_rank: int, num_processes: int) -> Iterator[str]:
    """Find too few devices for ``num_processes`` of this node, or one that does not compute."""
    if device_type != "cuda":
        return
    count = torch.cuda.device_count()
    if count < num_processes:
        yield f"{count} CUDA devices for {num_processes} processes"
    if local_rank >= count:
        return
    try:
        ones = torch.ones(256, 256, device=torch.device("cuda", local_rank))
        total = float((ones @ ones).sum())
    except RuntimeError as error:
        yield f"cuda:{local_rank} does not work: {_first_line(error)}"
        return
    if total != 256.0**3:
        yield f"cuda:{local_rank} computes wrong numbers"


def run_problems(run: RunDirectory, token: str) -> Iterator[str]:
    """Find a run's directory that is not rank 0's, or cannot be written.

    token: the end of the name of a file that rank 0 has written to ``logs/``.
    """
    until = time.monotonic() + _VISIBLE_SECONDS
    while not (run.logs / f"{MARK}{token}").is_file():
        if time.monotonic() > until:
            yield f"{run.path} is not the directory that rank 0 writes to: it is to be shared"
            return
        time.sleep(0.1)
    file = run.logs / f"{MARK}{token}-{secrets.token_hex(4)}"
    try:
        file.write_text(token)
        if file.read_text() != token:
            yield f"{run.logs} does not keep what is written to it"
        file.unlink()
    except OSError as error:
        # A full disk is full on every node.
        if error.errno not in _FULL:
            yield f"{run.logs} cannot be written: {error.strerror}"


def data_problems(config: TrainConfig) -> Iterator[str]:
    """Find prepared data that are not there; shards elsewhere are not looked at."""
    for path in config.data.paths.values():
        if not is_url(path) and not os.access(path, os.R_OK | os.X_OK):
            yield f"{path} cannot be read"


def scratch_problems() -> Iterator[str]:
    """Find a directory for temporary files that is not the one that the environment asks for."""
    wanted = os.environ.get("TMPDIR")
    if wanted and Path(tempfile.gettempdir()).resolve() != Path(wanted).resolve():
        yield f"TMPDIR={wanted} cannot be written"


def versions() -> dict[str, str]:
    """Return what has to be equal on all nodes."""
    return {
        "python": platform.python_version(),
        **package_versions(),
        "CUDA of torch": torch.version.cuda or "none",
    }


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
