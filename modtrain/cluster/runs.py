"""What a run's directory tells of the run, read cheaply and without torch.

A file that is missing is nothing to tell of; one that is damaged is named in the run's notes, and
what the others say stands.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from modtrain.cluster.slurm import SlurmJob
from modtrain.common.atomic_io import is_locked
from modtrain.common.errors import ModtrainError
from modtrain.common.renamed_keys import translate
from modtrain.training.config import TrainConfig
from modtrain.training.plan import derive

T = TypeVar("T")

# What a directory has in it once a run was started there, or given to Slurm.
_MARK_FILES = frozenset(("config.yaml", "jobs.jsonl", "submit.sbatch"))
# And what it has once the run is one of its own, not only a place for what a job writes.
_RUN_FILES = ("config.yaml", "submitted.yaml", "submit.sbatch")
# The scripts of jobs that train no run in their own directory; the last is an array's.
_GROUP_SCRIPT = re.compile(r"(search|compare|prepare|debug|submit-[0-9a-f]{8})\.sbatch")
_RUN_FOLDERS = frozenset(("checkpoints", "tensorboard", "logs", "code"))
CANCELLED = "CANCELLED"
"""Holds the ids of the jobs that were cancelled, one a line: they are not to come back."""
LOSS, HELD_OUT = "loss", "held_out/causal_loss"
_BLOCK_BYTES = 2**16
# So far back the last losses are looked for; held-out losses may be many records apart.
_MAX_LOOKBACK = 2**20
# So long after a failure a job that is given up may still print.
_FINAL_OUTPUT_SECONDS = 90.0


class RunNotFoundError(ModtrainError):
    """There is no such run."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job that was given to Slurm.

    script: its path, empty where that is not known. time: when, in seconds since 1970; 0: unknown.
    """

    id: str
    script: str = ""
    time: float = 0

    def covers(self, name: str) -> bool:
        """Whether ``name`` is this job's id, or that of a task of this array."""
        return name == self.id or name.startswith(f"{self.id}_")

    def is_same(self, job: SlurmJob) -> bool:
        """Whether ``job`` is this one, and not one of the same number on another cluster."""
        if not self.script or not job.command:
            return True
        return Path(self.script).parts[-2:] == Path(job.command).parts[-2:]


@dataclass(frozen=True)
class Failure:
    """A failure that was noted. step: of the newest checkpoint then."""

    time: float
    job: str
    step: str
    cause: str


@dataclass
class RunRecord:
    """What is known of a run. Times are seconds since 1970.

    steps: of the whole run. restarts: starts but the first. saved: (step, time) of the newest
    checkpoint. failures: oldest first. submitted: jobs, oldest first. changed: when something was
    last recorded. notes: what could not be read.
    is_group: no run itself: the directory of a job that works on runs below it or on none, as that
    of a sweep, an array, a search, a comparison or a preparation. went_on: when a group's jobs were
    last given to Slurm or seen at work.
    """

    name: str
    path: Path
    complete: bool = False
    locked: bool = False
    starts: list[float] = field(default_factory=list)
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    held_out: float | None = None
    saved: tuple[int, float] | None = None
    changed: float | None = None
    failures: list[Failure] = field(default_factory=list)
    submitted: list[SubmittedJob] = field(default_factory=list)
    cancelled: frozenset[str] = frozenset()
    is_group: bool = False
    last_active: float = 0
    notes: list[str] = field(default_factory=list)

    @property
    def restarts(self) -> int:
        """How often it was started after the first time."""
        return max(0, len(self.starts) - 1)


def find_runs(root: Path) -> list[Path]:
    """List the directories of runs at and below ``root``, by name; one may hold others."""
    return sorted(_walk(root))


def _walk(root: Path) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()

    def look(folder: Path) -> Iterator[Path]:
        with suppress(OSError):
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                # A link to what was seen already, or to what it lies in.
                return
            seen.add((status.st_dev, status.st_ino))
            entries = list(os.scandir(folder))
            is_run = any(entry.name in _MARK_FILES for entry in entries)
            if is_run:
                yield folder
            for entry in entries:
                hidden = entry.name.startswith(".") or (is_run and entry.name in _RUN_FOLDERS)
                if not hidden and entry.is_dir():
                    yield from look(folder / entry.name)

    return look(root)


def existing_run(runs_dir: str, name: str) -> Path:
    """Return the directory of the run ``name``.

    Raises:
        RunsError: there is none.
    """
    path = Path(runs_dir) / name
    if not path.is_dir():
        raise RunNotFoundError(
            f"there is no run {path}\nremedy: see by `modtrain status` which there are; runs"
            " elsewhere are found with runs_dir=..."
        )
    return path


def read_run(path: Path, name: str) -> RunRecord:
    """Read what the directory ``path`` tells of its run. Raises nothing."""
    run = RunRecord(name, path)
    run.complete = (path / "COMPLETED").exists()
    run.locked = is_locked(path / ".lock")
    read = _Reader(run)
    read("manifest.json", lambda file: setattr(run, "starts", _starts(file)))
    read("jobs.jsonl", lambda file: setattr(run, "submitted", _submitted(file)))
    run.is_group = _is_group(run)
    read(CANCELLED, lambda file: setattr(run, "cancelled", frozenset(file.read_text().split())))
    read("failures.tsv", lambda file: run.failures.extend(_read_failures(file)))
    read("failure.json", lambda file: run.failures.extend(_read_final_failure(file)))
    if run.is_group:
        for file in sorted(path.glob("failures-*.tsv")):
            read(file.name, lambda file: run.failures.extend(_read_failures(file)))
        run.last_active = _last_active(run)
    run.failures.sort(key=lambda failure: failure.time)
    read("checkpoints", lambda folder: setattr(run, "saved", _newest_checkpoint(folder)))
    if not (run.complete and read("result.json", lambda file: _take_result(run, file))):
        read("config.yaml", lambda file: setattr(run, "steps", _steps(file)))
        read("metrics.jsonl", lambda file: _take_records(run, file))
    if run.saved is not None and not run.complete:
        # A signal's checkpoint is made between two records.
        run.step = max(run.step or 0, run.saved[0])
    return run


class _Reader:
    """Reads a run's files one by one, and notes those that are damaged."""

    def __init__(self, run: RunRecord) -> None:
        self.run = run

    def __call__(self, name: str, take: Callable[[Path], None]) -> bool:
        path = self.run.path / name
        try:
            take(path)
        except FileNotFoundError:
            return False
        except Exception as error:
            # Whatever a damaged file leads to, the other files and the other runs are told of.
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            reason = " ".join(reason.split())[:200] or type(error).__name__
            self.run.notes.append(f"{path} cannot be read: {reason}")
            return False
        return True


def time_of(text: str) -> float:
    """Return the seconds since 1970 that a time in ISO's spelling stands for."""
    return datetime.datetime.fromisoformat(text).timestamp()


def json_lines(path: Path) -> list[Any]:
    """Return the records of ``path``; lines that a kill cut short are left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def lines_from_end(path: Path, max_bytes: int | None = None) -> Iterator[bytes]:
    """Go through the lines of ``path`` from the last one, without their ends.

    farthest: bytes from the end at which to stop; None: at the file's beginning.
    """
    with path.open("rb") as file:
        offset = end = file.seek(0, os.SEEK_END)
        rest = b""
        while offset > 0 and (max_bytes is None or end - offset < max_bytes):
            size = min(_BLOCK_BYTES, offset)
            offset -= size
            file.seek(offset)
            first, *lines = (file.read(size) + rest).split(b"\n")
            yield from reversed(lines)
            rest = first
        if offset == 0 and end:
            yield rest


def _starts(path: Path) -> list[float]:
    return [time_of(start["time"]) for start in json.loads(path.read_text())["starts"]]


def _submitted(path: Path) -> list[SubmittedJob]:
    return [
        SubmittedJob(str(line["job"]), str(line.get("script") or ""), _time_or_0(line.get("time")))
        for line in json_lines(path)
        if isinstance(line, dict) and "job" in line
    ]


def _time_or_0(text: object) -> float:
    with suppress(ValueError):
        return time_of(str(text))
    return 0


def _is_group(run: RunRecord) -> bool:
    if not run.submitted or any((run.path / name).exists() for name in _RUN_FILES):
        return False
    scripts = (Path(job.script).name for job in run.submitted)
    return any(map(_GROUP_SCRIPT.fullmatch, scripts)) or has_runs_below(run.path)


def has_runs_below(path: Path) -> bool:
    """Whether the directory ``path`` holds others of runs."""
    return any(folder != path for folder in _walk(path))


def _last_active(run: RunRecord) -> float:
    """Return when a group's jobs were last given to Slurm, or printed what was no last word."""
    printed = [0.0]
    for path in run.path.glob("logs/slurm-*.out"):
        with suppress(OSError):
            printed.append(path.stat().st_mtime - _FINAL_OUTPUT_SECONDS)
    return max([*printed, *(job.time for job in run.submitted)])


def _read_failures(path: Path) -> list[Failure]:
    failures = []
    for line in path.read_text(errors="replace").splitlines():
        # A disk that was full left a part of a line.
        with suppress(ValueError):
            time, job, step, cause = line.split("\t", 3)
            failures.append(Failure(time_of(time), job, step, cause))
    return failures


def _read_final_failure(path: Path) -> list[Failure]:
    content = json.loads(path.read_text())
    if "job" in content:
        # A job's script has noted it among its failures already.
        return []
    return [Failure(time_of(content["time"]), "", "", f"{content['kind']}: {content['text']}")]


def _newest_checkpoint(root: Path) -> tuple[int, float] | None:
    """Return step and time of the newest; a name is given to whole ones alone, by renaming."""
    names = [name for name in os.listdir(root) if name.startswith("step-")]  # noqa: PTH208
    for name in sorted(names, reverse=True):
        with suppress(OSError, ValueError):
            return int(name.removeprefix("step-")), (root / name / "manifest.json").stat().st_mtime
    return None


def _take_result(run: RunRecord, path: Path) -> None:
    content = json.loads(path.read_text())
    run.steps = run.step = int(content["steps"])
    run.loss, run.held_out = content.get(LOSS), content.get(HELD_OUT)
    run.changed = path.stat().st_mtime


def _take_records(run: RunRecord, path: Path) -> None:
    """Find the last step and losses."""
    run.changed = path.stat().st_mtime
    for line in lines_from_end(path, _MAX_LOOKBACK):
        # Most records have no held-out loss, and are not worth parsing for one.
        if run.loss is not None and HELD_OUT.encode() not in line:
            continue
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError):
            # The last line may be cut short by a kill, or be written just now.
            continue
        run.step = step if run.step is None else max(run.step, step)
        run.loss = record.get(LOSS) if run.loss is None else run.loss
        run.held_out = record.get(HELD_OUT) if run.held_out is None else run.held_out
        if run.loss is not None and run.held_out is not None:
            return


def _steps(path: Path) -> int | None:
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load(path.read_text(), loader)  # noqa: S506
    content = translate(content)
    if content["budget"]["steps"] is not None:
        return int(content["budget"]["steps"])
    return derive(_typed(TrainConfig, content)).steps


def _typed(kind: type[T], content: dict[str, Any]) -> T:
    """Make a configuration of plain values; OmegaConf takes ten times as long."""
    values = {}
    for entry in fields(kind):  # type: ignore[arg-type]
        if entry.name in content:
            default = entry.default_factory() if callable(entry.default_factory) else None
            value = content[entry.name]
            nested = is_dataclass(default) and isinstance(value, dict)
            values[entry.name] = _typed(type(default), value) if nested else value
    return kind(**values)


def newest_first(submitted: Sequence[SubmittedJob]) -> list[str]:
    """Return the ids of jobs, each once, the one given to Slurm last first."""
    return list(dict.fromkeys(job.id for job in reversed(submitted)))
