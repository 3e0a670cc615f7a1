"""Starts the processes of a run on this machine through torch's elastic launcher, as torchrun does.

torch.distributed.elastic meets the processes, watches them and passes signals on. What is added is
the exit code, which torchrun does not keep, and the errors of ranks whose output is not shown.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from modtrain.common.terminal import plain_console

# Seconds between a signal and the kill. torch's own 30 may be too few for a checkpoint.
_SHUTDOWN_SECONDS = "600"
_TAIL_LINES = 40
# Resumable: a signal or a limit of time, whose message rank 0 has printed.
_STOPPED = (75, 130)


def launch_local(arguments: Sequence[str], num_processes: int, num_threads: int) -> int:
    """Run ``python`` with these arguments in so many ranks; rank 0 has this process's output.

    num_threads: of each process, unless OMP_NUM_THREADS is set.

    Returns:
        0 where all ranks returned 0, else the code of the first that failed; 130 after Ctrl-C, 75
        after another signal.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_SECONDS)
    with TemporaryDirectory(prefix="modtrain-ranks-") as folder:
        redirects = dict.fromkeys(range(1, num_processes), Std.ALL)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=redirects),
            # Not SIGHUP, which nohup has ignored.
            signals_to_handle="SIGTERM,SIGINT,SIGQUIT,SIGUSR1",
        )
        try:
            launch: Any = elastic_launch(config, sys.executable)
            launch(*arguments)
        except ChildFailedError as error:
            first, failure = error.get_first_failure()
            code = _exit_code(failure)
            if code not in _STOPPED:
                _print_errors(Path(folder), first, error.failures)
            return code
        except SignalException as error:
            return 130 if error.sigval == signal.SIGINT else 75
    return 0


def _exit_code(failure: ProcessFailure) -> int:
    """Return a process's exit code, 128 and the signal's number where one ended it."""
    code: int = failure.exitcode
    return code if code >= 0 else 128 - code


def _print_errors(folder: Path, first: int, failures: Mapping[int, ProcessFailure]) -> None:
    """Print the end of what failed ranks wrote that nobody saw, and how the first one ended."""
    console = plain_console(stderr=True, soft_wrap=True)
    for rank in sorted(failures):
        for path in folder.glob(f"*/attempt_0/{rank}/stderr.log"):
            lines = path.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            if lines and failures[rank].exitcode != -signal.SIGTERM:
                console.print("\n  ".join([f"rank {rank}:", *lines]))
    code = failures[first].exitcode
    if code < 0:
        name = signal.Signals(-code).name
        console.print(f"rank {first} was ended by {name}")
