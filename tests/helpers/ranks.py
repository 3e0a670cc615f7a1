"""Ranks of a process group, forked from a warm interpreter: real ones, without the imports.

The interpreter is multiprocessing's fork server, which has torch, Lightning and modtrain imported
and computes nothing itself, so that no thread pool is forked. A function that ranks run is found by
its name: it stands at the top of a test's module, and its arguments are pickled.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_WARM = ["pytest", "hypothesis", "lightning.pytorch.strategies", "modtrain.training.run"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(_WARM)

TIMEOUT = 120.0
_GIVEN_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


class RankFailedError(AssertionError):
    """What a rank raised, with its traceback."""

    def __init__(self, rank: int, kind: str, message: str, trace: str) -> None:
        super().__init__(f"rank {rank}: {kind}: {message}\n{trace}")
        self.rank, self.kind, self.message = rank, kind, message


def on_ranks(
    function: Callable[..., Any], world_size: int = 2, *arguments: Any, **options: Any
) -> list[Any]:
    """Call ``function(*arguments)`` on every rank and return what each one returned.

    options: those of `outcomes_on_ranks`.

    Raises:
        RankFailedError: the first rank that raised, or died; its notes say how the others failed.
        TimeoutError: some rank did not end in time; names them.
    """
    outcomes = outcomes_on_ranks(function, world_size, *arguments, **options)
    failed = [outcome for outcome in outcomes if isinstance(outcome, RankFailedError)]
    if failed:
        # Ranks that waited for the failed one fail too: no single message is the cause.
        for other in failed[1:]:
            failed[0].add_note(str(other))
        raise failed[0]
    return outcomes


def outcomes_on_ranks(
    function: Callable[..., Any],
    world_size: int = 2,
    *arguments: Any,
    timeout: float = TIMEOUT,
    joins: bool = True,
) -> list[Any]:
    """As `on_ranks`, but a rank that raised or died gives its `RankFailedError` as its outcome.

    joins: make a gloo process group first.
    """
    with Fleet(function, world_size, *arguments, joins=joins) as fleet:
        return fleet.outcomes(timeout)


class Fleet:
    """Ranks that run ``function(*arguments)``; ranks left at the block's end are killed."""

    def __init__(
        self, function: Callable[..., Any], world_size: int, *arguments: Any, joins: bool = True
    ) -> None:
        port = free_port()
        self.children: list[Any] = []
        self.pipes: dict[Connection, int] = {}
        for rank in range(world_size):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            environment = _environment(rank, world_size, port)
            # No daemon, which must not have workers of its own.
            child = CONTEXT.Process(
                target=_child, args=(theirs, function, arguments, environment, joins)
            )
            child.start()
            theirs.close()
            self.children.append(child)
            self.pipes[ours] = rank

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_error: object) -> None:
        for child in self.children:
            child.join(2)
            if child.is_alive():
                child.kill()
                child.join()

    def signal(self, signum: int, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in ranks or range(len(self.children)):
            if self.children[rank].is_alive():
                os.kill(self.children[rank].pid, signum)

    def is_running(self) -> bool:
        """Whether any rank is."""
        return any(child.is_alive() for child in self.children)

    def outcomes(self, timeout: float = TIMEOUT) -> list[Any]:
        """Wait for all ranks; what each returned, or its `RankFailedError`.

        Raises:
            TimeoutError: some rank did not end in time; names them.
        """
        by_rank: dict[int, Any] = {}
        pipes, deadline = dict(self.pipes), time.monotonic() + timeout
        while pipes:
            ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(pipes.values())
                raise TimeoutError(f"ranks {late} did not end within {timeout:.0f} s; {by_rank}")
            for pipe in ready:
                rank = pipes.pop(pipe)  # type: ignore[arg-type]
                by_rank[rank] = self._outcome(rank, pipe)  # type: ignore[arg-type]
        return [by_rank[rank] for rank in range(len(self.children))]

    def _outcome(self, rank: int, pipe: Connection) -> Any:
        try:
            kind, value = pipe.recv()
        except EOFError:
            self.children[rank].join(5)
            return RankFailedError(rank, "died", f"exit code {self.children[rank].exitcode}", "")
        return value if kind == "ok" else RankFailedError(rank, *value)


def free_port() -> int:
    """Return a free port, which no outgoing connection is given meanwhile."""
    first_given = int(_GIVEN_PORTS.read_text().split()[0]) if _GIVEN_PORTS.exists() else 32768
    below = range(first_given - 10_000, first_given) if first_given > 12_000 else range(0, 1)
    for _ in range(100):
        with socket.socket() as probe:
            try:
                # Not by `random`, which tests seed: processes beside this one would find the same.
                probe.bind(("127.0.0.1", below[secrets.randbelow(len(below))]))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError(f"no free port among {below}")


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """As torchrun sets it on one node."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "test",
    }


def _child(
    pipe: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    joins: bool,
) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        if joins:
            dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        pipe.send(("ok", function(*arguments)))
        if joins:
            # Gloo's connections count as broken on a rank that is still making them when this ends.
            with suppress(RuntimeError):
                dist.barrier()
    except BaseException as error:
        pipe.send(("error", (type(error).__name__, str(error), traceback.format_exc())))
    finally:
        if dist.is_initialized():
            with suppress(Exception):
                dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of a store or a group that a failed rank left must not keep it from ending.
    os._exit(0)
