"""Metrics as one line of JSON a record; by choice as CSV, on TensorBoard, on Weights & Biases."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from torch import Tensor

from modtrain.common.atomic_io import open_to_append, without_nan, write_text
from modtrain.common.errors import TrainingError
from modtrain.common.reading import (
    UnreadableError,
    lines_from_end,
    parse_object,
    read_or_set_aside,
    read_records,
    unused,
)
from modtrain.models.sequence import RoutingRecord
from modtrain.training.config import TrainConfig
from modtrain.training.csv_writer import CsvWriter
from modtrain.training.plan import TrainingPlan
from modtrain.training.run_directory import RunDirectory
from modtrain.training.tensorboard.writer import TensorBoardWriter

log = logging.getLogger(__name__)
# The last line may be cut.
_MAX_LOOKBACK = 2**18


class MetricsWriter(Protocol):
    """A place that records go to beside ``metrics.jsonl``."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record ``values``."""

    def add_image(self, step: int, name: str, image_HWC: Tensor) -> None:
        """Record a picture of bytes."""

    def add_histogram(self, step: int, name: str, values_N: Tensor) -> None:
        """Record a distribution."""

    def close(self) -> None:
        """Flush and close."""


class MetricsLog:
    """Writes each record with its step, tokens and FLOPs; on several ranks rank 0 does.

    A resumed run first removes the records after its checkpoint, so that every step is there once.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: TrainConfig,
        plan: TrainingPlan,
        start_step: int,
        writes: bool = True,
    ) -> None:
        """Open the files. writes: False on ranks that do not write.

        Raises:
            TrainingError: wandb cannot start.
        """
        self.plan = plan
        self._path = run.metrics
        self._file: BinaryIO | None = None
        self._writers: list[MetricsWriter] = []
        if not writes:
            return
        kept = keep_metrics(run.metrics, lambda record: record["step"] <= start_step)
        if gaps := missing_steps(run, [record["step"] for record in kept], start_step):
            shown = ", ".join(f"{first} and {last}" for first, last in gaps[:5])
            more = f" and {len(gaps) - 5} more places" if len(gaps) > 5 else ""
            log.warning("%s lacks records between steps %s%s", run.metrics, shown, more)
        self._file = open_to_append(run.metrics)
        if config.log.tensorboard:
            records = read_metrics(run.metrics)
            self._writers.append(TensorBoardWriter(run, config, plan, start_step, records))
        if config.log.csv:
            self._writers.append(CsvWriter(run, plan, partial(read_metrics, run.metrics)))
        if config.log.wandb:
            # An extra, which need not be installed.
            from modtrain.training.wandb_writer import WandbWriter  # noqa: PLC0415

            self._writers.append(WandbWriter(run, config, plan))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record ``values`` as of the end of optimizer step ``step``."""
        if self._file is None:
            return
        record: dict[str, Any] = {
            "step": step,
            "tokens": step * self.plan.tokens_per_step,
            "flops": self.plan.flops_until(step),
            **values,
        }
        try:
            self._file.write(to_json(record).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            # What is left in the buffer would fail again where it is closed.
            with suppress(OSError):
                self._file.close()
            self._file = None
            raise TrainingError(
                f"{self._path} cannot be written: {error.strerror}. What was saved is kept\n"
                "remedy: free space or repair the disk, then run the same command, which resumes"
            ) from error
        for writer in self._writers:
            writer.write(step, values)

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        """Record ``values`` of processes: not in ``metrics.jsonl``, which is the run's."""
        for writer in self._writers:
            # A CSV file has the records of metrics.jsonl.
            if not isinstance(writer, CsvWriter):
                writer.write(step, values)

    def add_routing(
        self, step: int, labels: Sequence[str], records: Sequence[RoutingRecord]
    ) -> None:
        """Record a picture of what each router chose, and the distribution of its scores.

        labels: of the routers. records: of a forward pass; its first sequence is shown.
        """
        if not self._writers:
            return
        # It takes half a second to load, and most verbs draw nothing.
        from modtrain.evaluation.routing_picture import routing_picture  # noqa: PLC0415

        picture_HWC = routing_picture(labels, records)
        for writer in self._writers:
            writer.add_image(step, "routing/layer x token", picture_HWC)
            for label, record in zip(labels, records, strict=True):
                writer.add_histogram(step, f"scores/{label}", record.scores_BS[0].float().cpu())

    def close(self) -> None:
        """Flush and close everything."""
        if self._file is not None:
            self._file.close()
        for writer in self._writers:
            writer.close()


def to_json(values: Mapping[str, Any]) -> str:
    """Return ``values`` as JSON, which has no NaN or infinity: ``null`` stands for them."""
    return json.dumps(without_nan(values))


def read_metrics(path: Path, with_null: bool = False) -> list[dict[str, Any]]:
    """Return the records of a metrics file.

    with_null: with None for values that were not finite; otherwise they are absent.

    Lines that are damaged are left out, with a warning; a last line that a kill cut without.

    Raises:
        UnreadableError: it is no file that can be read.
    """
    if not os.path.lexists(path):
        return []
    records, damaged = read_records(path, _is_record)
    if damaged:
        log.warning("%s", _describe_damage(path, damaged))
    if with_null:
        return records
    return [
        {key: value for key, value in record.items() if value is not None} for record in records
    ]


def last_recorded_step(path: Path) -> int:
    """Return the last step in a metrics file, 0 without one; it is not read whole."""
    with suppress(UnreadableError):
        for line in lines_from_end(path, _MAX_LOOKBACK):
            record = parse_object(line)
            if record is not None and _is_record(record):
                return int(record["step"])
    return 0


def missing_steps(
    run: RunDirectory, steps: Sequence[int], start_step: int
) -> list[tuple[int, int]]:
    """Return the pairs of steps up to ``start_step`` between which records are lost.

    steps: of the records that there are. Empty where the run's starts have not all noted at which
    interval they recorded, as those of earlier versions have not.
    """
    if not run.manifest.is_file():
        return []
    manifest = run.read_manifest()
    intervals = [start.get("log_every") for start in manifest["starts"]]
    if not intervals or any(type(interval) is not int for interval in intervals):
        return []
    if run.config.is_file():
        # The first start's, which a restored manifest lacks.
        intervals.append(run.read_config().log.every)
    parent = manifest.get("parent")
    begin = 0
    if isinstance(parent, Mapping) and parent.get("how") == "branch":
        # The steps before are recorded by the run that it branches off.
        begin = parent["step"] if isinstance(parent.get("step"), int) else 0
    places = sorted({begin, start_step, *steps})
    return [pair for pair in pairwise(places) if pair[1] - pair[0] > max(intervals)]


def keep_metrics(path: Path, is_kept: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Rewrite the file, if there is one, with those of its records that ``is_kept`` accepts.

    Returns these records.

    Damage is no reason not to train: a file with damaged lines, or what is no file, is kept as
    ``damaged-<name>``, with a warning.
    """
    read = read_or_set_aside(path, lambda path: read_records(path, _is_record))
    if read is None:
        return []
    records, damaged = read
    if damaged:
        kept = unused(path.with_name(f"damaged-{path.name}"))
        shutil.copyfile(path, kept)
        log.warning("%s; kept as %s", _describe_damage(path, damaged), kept.name)
    kept_records = [record for record in records if is_kept(record)]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept_records))
    return kept_records


def _is_record(content: dict[str, Any]) -> bool:
    return type(content.get("step")) is int


def _describe_damage(path: Path, lines: list[int]) -> str:
    more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
    return f"{path} has damaged lines, which are left out: {', '.join(map(str, lines[:5]))}{more}"
