"""A corpus prepared by several processes on any nodes: each one's part, and who does the rest.

All hold one lock together while they encode. Who can take it alone afterwards is the last, and does
the rest as one process alone would, with all units finished.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from modtrain.common.atomic_io import NoLocksError, acquire_lock
from modtrain.common.errors import DataError, raise_if_any
from modtrain.data.config import PrepareConfig
from modtrain.data.prepare.encode import EncodeJob, encode_unit, finished_record
from modtrain.data.prepare.given_tokenizer import given_tokenizer
from modtrain.data.prepare.pipeline import encode_jobs, prepare
from modtrain.data.prepare.report import PrepareReport
from modtrain.data.prepare.source_checks import refuse_misfits
from modtrain.data.prepare.sources import expand_sources
from modtrain.data.prepare.stored_tokenizer import ensure_tokenizer
from modtrain.data.prepare.task import (
    Task,
    TaskReport,
    bytes_elsewhere,
    num_unfinished,
    own_staging,
)
from modtrain.data.prepare.units import plan_units
from modtrain.data.prepare.work_directory import LOCK_NAME, InUseError, make_folders
from modtrain.data.prepare.worker_pool import Elsewhere, run_unfinished
from modtrain.data.stream.prepared import INDEX_NAME

# Seconds for which a task that begins late waits for one that is at the rest.
_PATIENCE = 60.0


@dataclass(frozen=True)
class _Encoded:
    """What a task has encoded: how many units; files that show that the other ones are finished.

    has_locks: whether the file system has.
    """

    num_units: int
    other_records: list[Path]
    has_locks: bool


def prepare_task(config: PrepareConfig, progress: bool = True) -> PrepareReport | TaskReport:
    """Do the part of ``config.task``, and the rest where it is the last; without a task, all of it.

    progress: show a bar on a terminal, or log lines elsewhere; over all tasks.
    Raises ConfigError and DataError as `prepare` does.
    """
    raise_if_any(config.problems())
    if config.task is None:
        return prepare(config, progress)
    task = Task.of(config.task)
    try:
        encoded = _encode_own(config, task, progress)
        report = None if encoded is None else _report_of(encoded, task, Path(config.output))
    except FileNotFoundError as error:
        if not (Path(config.output) / INDEX_NAME).exists():
            raise DataError(f"{error.filename}: {error.strerror}") from error
        # Another task was faster with all the rest, and has removed the working directory.
        report = None
    except OSError as error:
        raise DataError(f"{error.filename or config.output}: {error.strerror or error}") from error
    if report is not None and report.waiting:
        return report
    try:
        return prepare(replace(config, task=None), progress)
    except InUseError:
        if report is None:
            raise
        return replace(report, waiting="Another task ends later, and does the rest.")


def _report_of(encoded: _Encoded, task: Task, output: Path) -> TaskReport:
    """Report what is still open. An empty ``waiting`` says that the rest may be done."""
    num_open, waiting = num_unfinished(encoded.other_records), ""
    if num_open:
        waiting = "The task that ends last does the rest; if none is to come, start one again."
    elif not encoded.has_locks:
        waiting = (
            "This file system has no locks, so no task knows that it is the last: once all have"
            " ended, run the command once without task."
        )
    return TaskReport(task, output, encoded.num_units, num_open, waiting)


def _encode_own(config: PrepareConfig, task: Task, progress: bool) -> _Encoded | None:
    """Encode the task's own units; None: another process has finished everything."""
    output = Path(config.output)
    files = expand_sources(config.sources)
    refuse_misfits(config, files)
    given = given_tokenizer(config.tokenizer)
    if (output / INDEX_NAME).exists():
        return None
    work = make_folders(output)
    in_use = InUseError(output)
    has_locks = True
    with ExitStack() as locks:
        try:
            lock = acquire_lock(work / LOCK_NAME, in_use, _PATIENCE, is_shared=True)
            locks.enter_context(lock)
        except NoLocksError:
            has_locks = False
        if (output / INDEX_NAME).exists():
            # Finished while this one waited.
            return None
        units = plan_units(files, config.text_column, config.text_template)
        staging = locks.enter_context(own_staging(work))
        with ExitStack() as training:
            if has_locks:
                # One trains; the others find what it made.
                training.enter_context(acquire_lock(work / "tokenizer.lock", timeout=math.inf))
            tokenizer = ensure_tokenizer(config, units, output, work, staging, given)
        jobs = encode_jobs(config, units, tokenizer, work, staging)
        own = [job for number, job in enumerate(jobs) if task.owns(number)]
        others = [job for number, job in enumerate(jobs) if not task.owns(number)]
        _encode(own, others, config.num_workers, progress)
    return _Encoded(len(own), [job.record_file for job in others], has_locks)


def _encode(
    own: list[EncodeJob], others: list[EncodeJob], num_workers: int, progress: bool
) -> None:
    sizes = [job.unit.num_bytes for job in others]
    files = [job.record_file for job in others]
    run_unfinished(
        "encoding",
        encode_unit,
        finished_record,
        own,
        [job.unit.num_bytes for job in own],
        num_workers,
        progress,
        Elsewhere(sum(sizes), bytes_elsewhere(files, sizes)),
    )
