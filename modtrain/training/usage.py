"""What each start of a run has used: devices, time, steps. Imports nothing heavy.

``usage.json`` in the run's directory has an entry for each start, which is written anew while the
run trains: a start that is killed is known up to its last record.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from modtrain.common.atomic_io import write_text
from modtrain.common.reading import UnreadableError, read_json, read_or_set_aside

USAGE = "usage.json"
JOB_TIMES = "MODTRAIN_JOB_TIMES"
"""The variable in which a job's script has two times in seconds since 1970: since when the job
could have started, and when it did."""
# Seconds between two writes while a run trains.
_INTERVAL = 20.0


@dataclass
class StartUsage:
    """One start. Times are seconds since 1970.

    begun, until: of training's processes, ``until`` of the last record. allocated: when the job
    got its nodes, None without one or not known; queued: seconds that it had waited for them.
    first_step: the step that it resumed from. last_step: the last one that it recorded.
    num_repeated: steps made again after a roll back. training_seconds, flops: of the steps that it
    made. processes, nodes, gpus, cpus: of the whole run; cpus are those of its nodes that it may
    use. peak_flops: FLOP/s of a device at the run's precision, None where they are not known. end:
    how it ended, empty while it runs, and if it was killed.
    """

    begun: float
    until: float
    first_step: int = 0
    last_step: int = 0
    num_repeated: int = 0
    training_seconds: float = 0.0
    flops: float = 0.0
    processes: int = 1
    nodes: int = 1
    gpus: int = 0
    cpus: int = 1
    device: str = "cpu"
    peak_flops: float | None = None
    job: str = ""
    allocated: float | None = None
    queued: float | None = None
    end: str = ""

    @property
    def num_made(self) -> int:
        """Steps that it made."""
        return max(0, self.last_step - self.first_step) + self.num_repeated

    @property
    def num_devices(self) -> int:
        """GPUs, or where there are none cores."""
        return self.gpus or self.cpus

    @property
    def device_seconds(self) -> float:
        """Seconds of all devices, from when the job got its nodes to the last record."""
        begun = self.begun if self.allocated is None else min(self.allocated, self.begun)
        return max(0.0, self.until - begun) * self.num_devices


class UsageRecord:
    """Keeps the entry of this start; on ranks that do not write it does nothing."""

    def __init__(self, folder: Path, writes: bool) -> None:
        self._path, self._writes = folder / USAGE, writes
        self._earlier: list[dict[str, Any]] = []
        self.own = StartUsage(time.time(), time.time())
        self._written, self._last_flops = 0.0, 0.0
        self._is_begun, self._is_resumed = False, False

    def begin(self, last_recorded: int, own: StartUsage) -> None:
        """Add this start. last_recorded: the last step that a start before has recorded."""
        if not self._writes:
            return
        self.own, self._is_begun = own, True
        content = read_or_set_aside(self._path, read_json) if self._path.exists() else None
        starts = (content or {}).get("starts")
        entries = starts if isinstance(starts, list) else []
        self._earlier = [entry for entry in entries if isinstance(entry, dict)]
        if self._earlier and not self._earlier[-1].get("end"):
            # What was killed may have recorded more than its entry has.
            last = self._earlier[-1].get("last_step")
            if isinstance(last, int):
                self._earlier[-1]["last_step"] = max(last, last_recorded)
        self._write()

    def resume(self, step: int, flops: float) -> None:
        """Note the step that training begins at. flops: of the steps before."""
        if not self._is_resumed:
            self.own.first_step = self.own.last_step = step
        elif step < self.own.last_step:
            self.own.num_repeated += self.own.last_step - step
            self.own.last_step = step
        self._is_resumed, self._last_flops = True, flops

    def update(self, step: int, flops: float, seconds: float) -> None:
        """Note that step ``step`` was made. seconds: of training since the last update."""
        self.own.flops += max(0.0, flops - self._last_flops)
        self._last_flops = flops
        self.own.last_step, self.own.until = step, time.time()
        self.own.training_seconds += seconds
        if time.monotonic() - self._written > _INTERVAL:
            self._write()

    def end(self, text: str) -> None:
        """Note how this start ended; one that was refused before it began is none."""
        self.own.end, self.own.until = " ".join(text.split())[:200], time.time()
        self._write()

    def _write(self) -> None:
        if not self._is_begun:
            return
        self._written = time.monotonic()
        content = {"starts": [*self._earlier, asdict(self.own)]}
        # Training does not depend on it.
        with suppress(OSError):
            write_text(self._path, json.dumps(content))


def read_usage(folder: Path) -> list[StartUsage]:
    """Return the starts that are recorded, oldest first; none of a run of an earlier version.

    Raises:
        UnreadableError: the file is damaged.
    """
    path = folder / USAGE
    if not path.is_file():
        return []
    starts = read_json(path).get("starts")
    if not isinstance(starts, list):
        raise UnreadableError(f"{USAGE} lacks the list of starts")
    return [_start(entry) for entry in starts]


def _start(entry: Any) -> StartUsage:
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "str": (str,), "float": (int, float)}
    values: dict[str, Any] = {}
    for known in fields(StartUsage):
        value = entry.get(known.name) if isinstance(entry, Mapping) else None
        name = str(known.type)
        # Another version may not know the others.
        if value is None and known.name not in ("begun", "until"):
            continue
        is_right = isinstance(value, kinds[name.partition(" ")[0]])
        if not is_right or not (isinstance(value, str) or _is_amount(value)):
            raise UnreadableError(f"{USAGE} has a start without {known.name}")
        values[known.name] = value
    return StartUsage(**values)


def _is_amount(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 <= value < math.inf


def job_times(
    environment: MutableMapping[str, str] = os.environ,
) -> tuple[float | None, float | None]:
    """Return when this process's job could have started, and when it did; None: not known.

    Only once: of a job that trains several runs the time before is the first one's.
    """
    with suppress(ValueError):
        eligible, started = map(float, environment.pop(JOB_TIMES, "").split())
        return eligible, started
    return None, None


def job_id(environment: Mapping[str, str] = os.environ) -> str:
    """Return the Slurm job that this process is in, of an array the task; empty: none."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{environment.get('SLURM_ARRAY_TASK_ID')}"
    return environment.get("SLURM_JOB_ID", "")


def node_cpus(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many cores of this node the job, or without one this process, may use."""
    text = environment.get("SLURM_CPUS_ON_NODE", "")
    if text.isdecimal() and int(text):
        return int(text)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass
class Cost:
    """What a run has used over all starts.

    device: ``GPU`` or ``core``, in whose hours all is; hours: None where they are not known.
    repeated_steps, repeated_hours: steps that were lost and made again. queue_hours: waiting for
    nodes. mfu: FLOPs over what the devices could have done, in training steps; mfu_of_all: of the
    steps that count, over all the time that the devices were taken. restarts: how many by cause.
    source: where the hours are from. unknown: what could not be determined, and why.
    """

    starts: int = 0
    device: str = "core"
    hours: float | None = None
    training_hours: float | None = None
    repeated_steps: int | None = None
    repeated_hours: float | None = None
    queue_hours: float | None = None
    mfu: float | None = None
    mfu_of_all: float | None = None
    restarts: dict[str, int] = field(default_factory=dict)
    source: str = ""
    unknown: list[str] = field(default_factory=list)


def cost_of_starts(starts: list[StartUsage]) -> Cost:
    """Add up what the starts used. Restarts are not among it: see `modtrain.cluster.cost`."""
    cost = Cost(len(starts), source="the run's own records")
    if not starts:
        return cost
    cost.device = "GPU" if any(start.gpus for start in starts) else "core"
    cost.hours = sum(start.device_seconds for start in starts) / 3600
    cost.training_hours = sum(s.training_seconds * s.num_devices for s in starts) / 3600
    cost.repeated_steps, cost.repeated_hours = 0, 0.0
    for start, after in zip(starts, [*starts[1:], None], strict=True):
        lost = start.num_repeated
        if after is not None:
            lost += max(0, start.last_step - after.first_step)
        cost.repeated_steps += lost
        if start.num_made:
            seconds = start.training_seconds / start.num_made
            cost.repeated_hours += lost * seconds * start.num_devices / 3600
    queued = [start.queued for start in starts if start.queued is not None]
    cost.queue_hours = sum(queued) / 3600 if queued else None
    _add_mfu(cost, starts)
    return cost


def _add_mfu(cost: Cost, starts: list[StartUsage]) -> None:
    if any(start.peak_flops is None for start in starts):
        return
    in_steps = sum(s.training_seconds * s.num_devices * (s.peak_flops or 0) for s in starts)
    taken = sum(s.device_seconds * (s.peak_flops or 0) for s in starts)
    flops = sum(start.flops for start in starts)
    made = sum(start.num_made for start in starts)
    if in_steps and taken and made:
        cost.mfu = flops / in_steps
        cost.mfu_of_all = flops * (1 - (cost.repeated_steps or 0) / made) / taken
