"""`modtrain logs`: the output of a run's jobs, or its records where it runs without Slurm."""

from __future__ import annotations

import codecs
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from modtrain.cluster import slurm
from modtrain.cluster.config import LogsConfig
from modtrain.cluster.runs import (
    HELD_OUT,
    LOSS,
    RunNotFoundError,
    RunRecord,
    SubmittedJob,
    existing_run,
    read_run,
)
from modtrain.cluster.slurm import SlurmError, SlurmJob
from modtrain.cluster.status import live_jobs, state_of
from modtrain.common.errors import raise_if_any
from modtrain.common.reading import blocks_from_end, parse_object
from modtrain.common.spelling import spelled
from modtrain.training.named_runs import missing_run
from modtrain.training.run_listing import has_runs_below

# Seconds between two reads of a file, and between two queries to Slurm.
_POLL_SECONDS, _SLURM_POLL_SECONDS = 0.5, 5.0

Show = Callable[[str], object]


def show_logs(config: LogsConfig) -> None:
    """Print the last lines, and with ``follow`` new ones until the run's jobs have ended.

    Raises:
        ConfigError: the request is invalid.
        RunNotFoundError: there is no such run or job, or nothing that it printed.
        SlurmError: a job is to be followed, and Slurm is not available.
    """
    raise_if_any(config.problems())
    run = read_run(existing_run(config.runs_dir, str(config.run)), str(config.run))
    if config.follow:
        _follow(run, config)
        return
    source = _source(run, config)
    if not source.show_new(last=config.lines) and config.lines:
        print(f"{source.path} is empty: nothing is recorded yet", file=sys.stderr)  # noqa: T201


class Tail:
    """The end of a file that grows, as text.

    is_rotated: what it held goes to ``<path>.1`` once it is large, and it begins anew.
    """

    def __init__(self, path: Path, show: Show, *, is_rotated: bool = False) -> None:
        self.path, self.show, self.is_rotated = path, show, is_rotated
        self.position = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show_new(self, last: int | None = None) -> bool:
        """Show what was added, and return whether there was something.

        A file that is missing for a while has nothing new. last: lines from the end at which to
        begin.
        """
        if last is not None:
            self.position = offset_of_last(self.path, last)
        text = ""
        with suppress(OSError), self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if self.is_rotated and size < self.position:
                text = self._decoder.decode(self._rest_of_part())
                self.position = 0
            # A resumed run truncates the records after its checkpoint; those were shown.
            self.position = min(self.position, size)
            file.seek(self.position)
            new = file.read()
            self.position += len(new)
            text += self._decoder.decode(new)
        if text:
            self.show(text)
        return bool(text)

    def _rest_of_part(self) -> bytes:
        """Return what the part before has that was not shown."""
        with suppress(OSError), self.path.with_name(f"{self.path.name}.1").open("rb") as file:
            file.seek(self.position)
            return file.read()
        return b""


def offset_of_last(path: Path, lines: int) -> int:
    """Return where the last ``lines`` lines of ``path`` begin, in bytes."""
    with path.open("rb") as file:
        if lines == 0:
            return file.seek(0, os.SEEK_END)
        # Not by lines: a progress bar makes one of a whole log.
        for number, (offset, block) in enumerate(blocks_from_end(file)):
            # The newline that ends the file starts no further line.
            at = len(block) - (number == 0 and block.endswith(b"\n"))
            while (at := block.rfind(b"\n", 0, at)) >= 0:
                lines -= 1
                if lines == 0:
                    return offset + at + 1
        return 0


_print = partial(print, end="", flush=True)


class _Records:
    """Formats the lines of ``metrics.jsonl`` for a console."""

    def __init__(self, steps: int | None) -> None:
        self.of = "" if steps is None else f"/{steps}"
        self._rest = ""

    def __call__(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            # A damaged one is left out.
            if (record := parse_object(line.encode())) is not None:
                _print(self._line(record) + "\n")

    def _line(self, record: dict[str, Any]) -> str:
        parts = [f"step {record.get('step')}{self.of}"]
        for name, label, form in (
            (LOSS, "loss", ".4f"),
            (HELD_OUT, "held-out loss", ".4f"),
            ("throughput/tokens_per_second", "tokens/s", ",.0f"),
            ("flops", "FLOPs", ".3g"),
        ):
            if isinstance(record.get(name), int | float):
                parts.append(f"{label} {record[name]:{form}}")
        return "  ".join(parts)


def _source(run: RunRecord, config: LogsConfig) -> Tail:
    """Choose what to show: the output of a job or of a sweep's job, or else the records."""
    for name in run.job_ids if config.job is None else [config.job]:
        output = _output_of(run, name)
        if output is not None:
            return Tail(output, _print, is_rotated=True)
    if config.job is not None:
        job_ids = ", ".join(spelled("job", name) for name in run.job_ids) or "none"
        text = f"{run.path} has no output of job={config.job}"
        raise RunNotFoundError(f"{text}\nremedy: its jobs are {job_ids}")
    if output := _newest_file(run.path.glob("logs/slurm-*.out")):
        return Tail(output, _print, is_rotated=True)
    for name in ("logs/job.log", "metrics.jsonl"):
        if (run.path / name).is_file():
            show = _Records(run.steps) if name == "metrics.jsonl" else _print
            return Tail(run.path / name, show)
    if (run.path / "sweep.json").is_file():
        raise RunNotFoundError(
            f"{run.path} is a sweep: its runs have the output\nremedy: list them with modtrain"
            f" status {spelled('sweep', run.name)}, and show one with modtrain logs"
            f" {spelled('run', f'{run.name}/<its name>')}"
        )
    if has_runs_below(run.path):
        raise RunNotFoundError(missing_run(str(run.path.parent), run.name))
    text = f"{run.path} has printed nothing yet"
    if run.job_ids:
        text += f"; its newest job is {run.job_ids[0]}: `modtrain status` shows why it is pending"
    raise RunNotFoundError(
        f"{text}\n"
        f"remedy: wait, or follow it with modtrain logs {spelled('run', run.name)} follow=true"
    )


def _output_of(run: RunRecord, name: str) -> Path | None:
    """Return the output of the job ``name``; of an array, that of the task that wrote last."""
    # The tasks of an array write to the folder above their runs.
    for folder in (run.path / "logs", run.path.parent / "logs"):
        outputs = [*folder.glob(f"slurm-{name}.out"), *folder.glob(f"slurm-{name}_*.out")]
        if outputs:
            return _newest_file(outputs)
    return None


def _newest_file(paths: Iterable[Path]) -> Path | None:
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def _follow(run: RunRecord, config: LogsConfig) -> None:
    """Show old and new output, across requeues and the jobs of a chain."""
    tails: dict[Path, Tail] = {}
    last_message, last_query = "", -_SLURM_POLL_SECONDS
    live: list[SlurmJob] = []
    alive = True
    while alive:
        if time.monotonic() - last_query >= _SLURM_POLL_SECONDS:
            run = read_run(run.path, run.name)
            live = _live_jobs(run, config.job, live)
            alive = bool(live) or (run.locked and config.job is None)
            last_query = time.monotonic()
            message = _pending_message(live) or last_message
            if message != last_message:
                print(message, file=sys.stderr)  # noqa: T201
            last_message = message
        for tail in tails.values():
            tail.show_new()
        with suppress(RunNotFoundError):
            newest = _source(run, config)
            if newest.path not in tails:
                newest.show_new(last=None if tails else config.lines)
                tails[newest.path] = newest
        if alive:
            time.sleep(_POLL_SECONDS)
    state = state_of(run, {})
    reason = f": {state.reason}" if state.reason else ""
    print(f"{run.path} is {state.name}{reason}", file=sys.stderr)  # noqa: T201


def _live_jobs(run: RunRecord, job_id: str | None, previous: list[SlurmJob]) -> list[SlurmJob]:
    """Query Slurm for the unfinished jobs; without an answer, return the previous ones."""
    if run.submitted and not slurm.has_slurm():
        raise SlurmError(
            f"Slurm is not available here, and job {run.job_ids[0]} cannot be followed without it\n"
            "remedy: follow it on a login node, or leave follow=true out"
        )
    try:
        live = live_jobs(run.submitted, slurm.jobs(run.job_ids))
    except SlurmError:
        return previous
    return [job for job in live if job_id is None or SubmittedJob(job_id).covers(job.id)]


def _pending_message(live: list[SlurmJob]) -> str:
    if not live or not live[0].is_pending:
        return ""
    job = live[0]
    start = f", expected to start at {job.start}" if job.start else ""
    return f"job {job.id} waits: {job.reason or job.state.lower()}{start}"
