"""``launch=local num_processes=N``: what a command says of its ranks. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modtrain.common.errors import Problem, raise_if_any

VERBS = ("train",)
"""The verbs that train on several ranks."""
KEYS = ("launch", "num_processes")
TRAIN_SEVERAL = ("compare", "isoflop", "search", "search-patterns")
"""The verbs that train several runs, each on one process."""


@dataclass(frozen=True)
class LocalRanks:
    """What a command line says of its ranks. words: the others. count: None: one a GPU."""

    words: list[str]
    count: int | None


def _elsewhere(verb: str) -> tuple[str, str]:
    """Return why ``verb`` starts no processes of its own here, and what to do instead."""
    if verb == "submit":
        return "starts processes on this machine, and a job has its own", (
            "leave it out; write nodes=… and gpus_per_node=…"
        )
    if verb in ("train -m", *TRAIN_SEVERAL):
        reason = "is for train with one run, and this trains several, each on one process"
        remedy = "leave it out, or start each run with modtrain train"
        return reason, remedy
    return "is for train, and this runs on one process", "leave it out"


def local_ranks(
    verb: str, words: Sequence[str], environment: Mapping[str, str] = os.environ
) -> LocalRanks | None:
    """Return what ``words`` say of ranks to start here; None where they say nothing.

    Raises:
        ConfigError: it cannot be.
    """
    given = {key: value for key, sign, value in (w.partition("=") for w in words) if sign}
    launch, count = given.get("launch"), given.get("num_processes")
    if launch is None and count is None:
        return None
    key, value = ("launch", launch) if launch is not None else ("num_processes", count)
    problems = []
    if verb not in VERBS:
        problems.append(Problem(key, value, *_elsewhere(verb)))
    elif launch is None:
        problems.append(Problem(key, value, "is missing launch=local", "add launch=local"))
    elif launch != "local":
        remedy = "write launch=local; over several nodes: torchrun, srun, or modtrain submit"
        problems.append(Problem(key, value, "is not a way to launch", remedy))
    elif "RANK" in environment and "WORLD_SIZE" in environment:
        reason = f"and this is one of {environment['WORLD_SIZE']} processes of a launcher already"
        problems.append(Problem(key, value, reason, "leave one of them out"))
    if count is not None and not (count.isdecimal() and int(count)):
        remedy = "give 2, or leave it out for one a GPU"
        problems.append(Problem("num_processes", count, "is not a number of processes", remedy))
    raise_if_any(problems)
    others = [word for word in words if word.partition("=")[0] not in KEYS]
    return LocalRanks(others, None if count is None else int(count))
