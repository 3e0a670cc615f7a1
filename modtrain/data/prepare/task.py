"""One of several processes, on any nodes, that prepare one corpus together.

Each encodes the units whose number leaves its own when divided by the number of tasks. The last one
that ends does the rest.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modtrain.common.errors import ConfigError, Problem

_TASK = re.compile(r"(\d{1,9})/(\d{1,9})")
# Seconds between two looks for what the other tasks have finished.
_LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class Task:
    """The task ``index`` of ``count``, from 0."""

    index: int
    count: int

    @classmethod
    def of(cls, text: str, environment: Mapping[str, str] = os.environ) -> Task:
        """The task that ``slurm`` or ``I/N`` stands for.

        Under Slurm: of a job array, of the tasks of one step, or of both.

        Raises:
            ConfigError: it is neither, or this process is no task of Slurm.
        """
        if text == "slurm":
            return cls._of_slurm(environment)
        parsed = _TASK.fullmatch(text)
        if parsed is None or int(parsed[1]) >= int(parsed[2]):
            reason, remedy = "is no task", "write task=slurm, or task=0/3, task=1/3 and task=2/3"
            raise ConfigError([Problem("task", text, reason, remedy)])
        return cls(int(parsed[1]), int(parsed[2]))

    @classmethod
    def _of_slurm(cls, environment: Mapping[str, str]) -> Task:
        def number(name: str, otherwise: int) -> int:
            text = environment.get(name, "")
            return int(text) if text.isdecimal() else otherwise

        is_array, is_step = "SLURM_ARRAY_TASK_ID" in environment, "SLURM_STEP_ID" in environment
        if not is_array and not is_step:
            reason = "is no task of Slurm: there is neither SLURM_ARRAY_TASK_ID nor SLURM_STEP_ID"
            remedy = "start it with srun or in a job array, or write task=0/3 and so on"
            raise ConfigError([Problem("task", "slurm", reason, remedy)])
        num_steps = number("SLURM_STEP_NUM_TASKS", 1) if is_step else 1
        place = number("SLURM_PROCID", 0) if is_step else 0
        if is_array:
            first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1)
            own = (number("SLURM_ARRAY_TASK_ID", 0) - first) // max(1, step)
            # A list such as 3,7 has gaps.
            count = max(own + 1, number("SLURM_ARRAY_TASK_COUNT", 1))
            return cls(own * num_steps + place, count * num_steps)
        return cls(place, num_steps)

    def owns(self, number: int) -> bool:
        """Whether the unit of this number is the task's."""
        return number % self.count == self.index


@dataclass(frozen=True)
class TaskReport:
    """What one task did, where another one does the rest.

    num_units: that it had to finish. num_open: units of others that are not finished yet. waiting:
    why it did not go on.
    """

    task: Task
    output: Path
    num_units: int
    num_open: int
    waiting: str

    def __str__(self) -> str:
        done = f"{self.output}: task {self.task.index} of {self.task.count} has its units"
        still = f"; {self.num_open:,} units of others are open" if self.num_open else ""
        return f"{done}, {self.num_units:,}{still}. {self.waiting}"


def num_unfinished(record_files: Sequence[Path]) -> int:
    """How many of these files, all of one folder, are not there."""
    return len(record_files) - sum(_is_there(record_files))


def bytes_elsewhere(record_files: Sequence[Path], sizes: Sequence[int]) -> Callable[[], int]:
    """Return a function that sums the sizes of the units that the other tasks have finished.

    It looks every few seconds at most.
    """
    latest, due = 0, 0.0

    def look() -> int:
        nonlocal latest, due
        if time.monotonic() >= due:
            there = _is_there(record_files)
            latest = sum(size for size, is_there in zip(sizes, there, strict=True) if is_there)
            due = time.monotonic() + _LOOK_SECONDS
        return latest

    return look


def _is_there(files: Sequence[Path]) -> list[bool]:
    if not files:
        return []
    # One listing of the folder is cheaper than a question for each file.
    with os.scandir(files[0].parent) as entries:
        names = {entry.name for entry in entries}
    return [file.name in names for file in files]


@contextmanager
def own_staging(work: Path) -> Iterator[Path]:
    """A folder of temporary files that is of this process alone, on whatever node."""
    staging = work / f"staging-{socket.gethostname()}-{os.getpid()}"
    staging.mkdir(exist_ok=True)
    try:
        yield staging
    finally:
        for left in staging.iterdir():
            left.unlink()
        staging.rmdir()
