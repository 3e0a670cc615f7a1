"""A job's own directory for temporary files on each node. Imports nothing heavy."""

from __future__ import annotations

import os
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from modtrain.common.errors import NodeError
from modtrain.distributed.launch import node_name

SCRATCH = "MODTRAIN_SCRATCH"
"""The variable by which a job's script names the directory, which has the job's number in it."""


def use_job_scratch(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make the directory that the environment names, and keep temporary files in it.

    The script can make it on its own node alone; it removes it from all when the job has ended.

    Raises:
        NodeError: it cannot be made or written: on this node.
    """
    path = environment.pop(SCRATCH, "")
    if not path:
        return
    try:
        # Processes of one node make it at the same time.
        Path(path).mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"test")
    except OSError as error:
        raise NodeError(
            f"{path} cannot be used on {node_name()}: {error.strerror}\nremedy: repair that node's"
            " disk, or set cluster.scratch to a directory that each node has"
        ) from error
    environment["TMPDIR"] = path
    # It may have chosen one before.
    tempfile.tempdir = None
