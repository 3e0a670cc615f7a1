"""A summary of a run from its directory, read cheaply and without torch.

Missing files are skipped. A damaged file is named in the run's notes, and the others are read.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from modtrain.cluster.slurm import SlurmJob
from modtrain.common.atomic_io import is_locked
from modtrain.common.errors import ModtrainError
from modtrain.common.reading import (
    UnreadableError,
    lines_from_end,
    read_json,
    read_records,
    read_text,
    read_yaml,
)
from modtrain.common.renamed_keys import translate
from modtrain.training.config import TrainConfig
from modtrain.training.named_runs import missing_run
from modtrain.training.plan import derive
from modtrain.training.run_directory import RunDirectory
from modtrain.training.run_listing import has_runs_below
from modtrain.training.step_times import SLOW_NODES, SlowRank, read_slow_nodes

T = TypeVar("T")

# A directory with one of these is a run's own, not only that of a job that works on other runs.
_RUN_FILES = ("config.yaml", "submitted.yaml", "submit.sbatch")
# The scripts of jobs that do not train a run in their own directory; the last is an array's.
_GROUP_SCRIPT = re.compile(r"(search|compare|prepare|debug|submit-[0-9a-f]{8})\.sbatch")
CANCELLED = "CANCELLED"
"""File of the ids of cancelled jobs, one a line. These jobs are not restarted."""
LOSS, HELD_OUT = "loss", "held_out/causal_loss"
# Bytes from the end in which the last losses are searched: there may be few held-out losses.
_MAX_LOOKBACK = 2**20
# A job may still print for this long after its final failure.
_FINAL_OUTPUT_SECONDS = 90.0


class RunNotFoundError(ModtrainError):
    """The run does not exist."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job that was submitted to Slurm.

    script: its path; empty: unknown. time: of the submission, in seconds since 1970; 0: unknown.
    verb: what it does for the run: ``train``, or ``eval``.
    """

    id: str
    script: str = ""
    time: float = 0
    verb: str = "train"

    def covers(self, name: str) -> bool:
        """Whether ``name`` is this job's id, or the id of a task of this array."""
        return name == self.id or name.startswith(f"{self.id}_")

    def is_same(self, job: SlurmJob) -> bool:
        """Whether ``job`` is this one, and not one with the same id on another cluster."""
        if not self.script or not job.command:
            return True
        # Slurm's command of a job by hand has the script's arguments as well.
        end = re.escape("/".join(Path(self.script).parts[-2:]))
        return re.search(rf"(?:^|/){end}(?: |$)", job.command) is not None


@dataclass(frozen=True)
class Failure:
    """A recorded failure. step: of the newest checkpoint at that time.

    node: the one that it is of, where another may not have it; the next start is without it.
    """

    time: float
    job: str
    step: str
    cause: str
    node: str = ""


@dataclass
class RunRecord:
    """What is known of a run. Times are seconds since 1970.

    steps: of the whole run. saved: (step, time) of the newest checkpoint. failures, submitted,
    evaluations: oldest first; the jobs that train the run, and those that evaluate it. parent: the
    run and step whose checkpoint it started from, or empty. changed: when something was last
    recorded. slow: processes that are slower than the others. notes: what could not be read.
    is_group: no run itself: the directory of a job that works on runs below it or on none, as that
    of a sweep, an array, a search, a comparison or a preparation. last_active: when a group's jobs
    were last given to Slurm or seen at work.
    """

    name: str
    path: Path
    complete: bool = False
    locked: bool = False
    starts: list[float] = field(default_factory=list)
    parent: str = ""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    held_out: float | None = None
    saved: tuple[int, float] | None = None
    changed: float | None = None
    failures: list[Failure] = field(default_factory=list)
    submitted: list[SubmittedJob] = field(default_factory=list)
    evaluations: list[SubmittedJob] = field(default_factory=list)
    cancelled: frozenset[str] = frozenset()
    is_group: bool = False
    last_active: float = 0
    slow: list[SlowRank] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def job_ids(self) -> list[str]:
        """Ids of the jobs that train the run, each once, the last one first."""
        return list(dict.fromkeys(job.id for job in reversed(self.submitted)))

    @property
    def all_jobs(self) -> list[SubmittedJob]:
        """All jobs of the run, those that evaluate it last."""
        return [*self.submitted, *self.evaluations]


def existing_run(runs_dir: str, name: str) -> Path:
    """Return the directory of the run ``name``.

    Raises:
        RunNotFoundError: there is none.
    """
    path = Path(runs_dir) / name
    if not path.is_dir():
        raise RunNotFoundError(missing_run(runs_dir, name))
    return path


def read_run(path: Path, name: str) -> RunRecord:
    """Summarize the run in the directory ``path``. Raises nothing."""
    run = RunRecord(name, path)
    if not os.access(path, os.X_OK, effective_ids=True):
        # Its files would look as if they were missing.
        run.notes.append(f"{path} cannot be read: permission denied")
    run.complete = RunDirectory(path).is_complete
    run.locked = is_locked(path / ".lock")
    run.starts = _read(run, "manifest.json", _starts) or []
    run.parent = _read(run, "manifest.json", _parent) or ""
    jobs = _read(run, "jobs.jsonl", _submitted) or []
    run.submitted = [job for job in jobs if job.verb != "eval"]
    run.evaluations = [job for job in jobs if job.verb == "eval"]
    run.is_group = _is_group(run)
    run.cancelled = frozenset(_read(run, CANCELLED, lambda file: read_text(file).split()) or ())
    run.failures += _read(run, "failures.tsv", _read_failures) or []
    run.failures += _read(run, "failure.json", _read_final_failure) or []
    if run.is_group:
        for file in sorted(path.glob("failures-*.tsv")):
            run.failures += _read(run, file.name, _read_failures) or []
        run.last_active = _last_active(run)
    run.failures.sort(key=lambda failure: failure.time)
    run.saved = _read(run, "checkpoints", _newest_checkpoint)
    if not run.complete:
        run.slow = _read(run, SLOW_NODES, lambda file: read_slow_nodes(file.parent)) or []
    if not (run.complete and _read(run, "result.json", partial(_take_result, run))):
        run.steps = _read(run, "config.yaml", _steps)
        _read(run, "metrics.jsonl", partial(_take_records, run))
    if run.saved is not None and not run.complete:
        # A checkpoint on a signal is saved between two records.
        run.step = max(run.step or 0, run.saved[0])
    return run


def _read(run: RunRecord, name: str, parse: Callable[[Path], T]) -> T | None:
    """Parse one of the run's files; None where it is missing, or damaged, which is recorded."""
    path = run.path / name
    if not os.path.lexists(path):
        return None
    try:
        return parse(path)
    except Exception as error:
        # Whatever a damaged file raises, the other files and the other runs are shown.
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        reason = " ".join(reason.split())[:200] or type(error).__name__
        run.notes.append(f"{path} cannot be read: {reason}")
        return None


def time_of(text: str) -> float:
    """Convert a time in ISO format to seconds since 1970."""
    return datetime.datetime.fromisoformat(text).timestamp()


def read_job_ids(folder: Path) -> list[str]:
    """Return the ids of the jobs that train the run in ``folder``, oldest first."""
    path = folder / "jobs.jsonl"
    jobs = _submitted(path) if path.is_file() else []
    return [job.id for job in jobs if job.verb != "eval"]


def _starts(path: Path) -> list[float]:
    return [time_of(start["time"]) for start in read_json(path)["starts"]]


def _parent(path: Path) -> str:
    parent = read_json(path).get("parent")
    return f"{parent['run']}, step {parent['step']} ({parent['how']}.run)" if parent else ""


def _submitted(path: Path) -> list[SubmittedJob]:
    return [
        SubmittedJob(
            str(line["job"]),
            str(line.get("script") or ""),
            _time_or_0(line.get("time")),
            str(line.get("verb") or "train"),
        )
        for line in read_records(path, lambda line: "job" in line)[0]
    ]


def _time_or_0(text: object) -> float:
    with suppress(ValueError):
        return time_of(str(text))
    return 0


def _is_group(run: RunRecord) -> bool:
    if not run.submitted or any(os.path.lexists(run.path / name) for name in _RUN_FILES):
        return False
    scripts = (Path(job.script).name for job in run.submitted)
    return any(map(_GROUP_SCRIPT.fullmatch, scripts)) or has_runs_below(run.path)


def _last_active(run: RunRecord) -> float:
    """Return when a group's jobs were last submitted, or last printed while at work."""
    printed = [0.0]
    for path in run.path.glob("logs/slurm-*.out"):
        with suppress(OSError):
            printed.append(path.stat().st_mtime - _FINAL_OUTPUT_SECONDS)
    return max([*printed, *(job.time for job in run.submitted)])


def _read_failures(path: Path) -> list[Failure]:
    failures = []
    for line in read_text(path).splitlines():
        # A full disk may leave a partial line.
        with suppress(ValueError):
            time, job, step, cause, *node = line.split("\t", 4)
            failures.append(Failure(time_of(time), job, step, cause, *node))
    return failures


def _read_final_failure(path: Path) -> list[Failure]:
    content = read_json(path)
    if "job" in content:
        # The job's script has recorded it in failures.tsv already.
        return []
    return [Failure(time_of(content["time"]), "", "", f"{content['kind']}: {content['text']}")]


def _newest_checkpoint(root: Path) -> tuple[int, float] | None:
    """Return step and time of the newest; only a complete one has a name of this form."""
    names = [entry.name for entry in root.iterdir() if entry.name.startswith("step-")]
    for name in sorted(names, reverse=True):
        with suppress(OSError, ValueError, KeyError, UnreadableError):
            step, manifest = int(name.removeprefix("step-")), root / name / "manifest.json"
            # One with the name of another step is a copy.
            if read_json(manifest)["step"] == step:
                return step, manifest.stat().st_mtime
    return None


def _take_result(run: RunRecord, path: Path) -> bool:
    content = read_json(path)
    run.steps = run.step = int(content["steps"])
    run.loss, run.held_out = content.get(LOSS), content.get(HELD_OUT)
    run.changed = path.stat().st_mtime
    return True


def _take_records(run: RunRecord, path: Path) -> None:
    """Read the last step and losses."""
    run.changed = path.stat().st_mtime
    for line in lines_from_end(path, _MAX_LOOKBACK):
        # Most records have no held-out loss: do not parse them for it.
        if run.loss is not None and HELD_OUT.encode() not in line:
            continue
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            # The last line may be partial: cut by a kill, or being written.
            continue
        run.step = step if run.step is None else max(run.step, step)
        run.loss = record.get(LOSS) if run.loss is None else run.loss
        run.held_out = record.get(HELD_OUT) if run.held_out is None else run.held_out
        if run.loss is not None and run.held_out is not None:
            return


def _steps(path: Path) -> int | None:
    content = translate(read_yaml(path))
    if content["budget"]["steps"] is not None:
        return int(content["budget"]["steps"])
    return derive(_typed(TrainConfig, content)).steps


def _typed(kind: type[T], content: dict[str, Any]) -> T:
    """Build a configuration from plain values; OmegaConf takes ten times as long."""
    values = {}
    for entry in fields(kind):  # type: ignore[arg-type]
        if entry.name in content:
            default = entry.default_factory() if callable(entry.default_factory) else None
            value = content[entry.name]
            nested = is_dataclass(default) and isinstance(value, dict)
            values[entry.name] = _typed(type(default), value) if nested else value
    return kind(**values)
