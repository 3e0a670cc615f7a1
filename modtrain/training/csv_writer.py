"""Metrics as a CSV file, a row a record, for spreadsheets and pandas."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

from torch import Tensor

from modtrain.common.atomic_io import name_file, open_to_append, write_text
from modtrain.training.plan import TrainingPlan
from modtrain.training.run_directory import RunDirectory


class CsvWriter:
    """A column for each metric so far; a cell is empty where a record does not have it.

    Lightning's CSVLogger removes the file of an earlier start; here it is made of the records that
    a resumed run keeps.
    """

    def __init__(
        self,
        run: RunDirectory,
        plan: TrainingPlan,
        read: Callable[[], Iterable[Mapping[str, Any]]],
    ) -> None:
        """Write the file anew. read: returns the run's records, the newest one included."""
        self._path, self._plan, self._read = run.metrics_csv, plan, read
        self._columns: list[str] = []
        self._file: BinaryIO | None = None
        self._write_all()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record ``values``; a metric that is new becomes a column of the whole file."""
        if not values.keys() <= set(self._columns) or self._file is None:
            self._write_all()
            return
        position = (step, step * self._plan.tokens_per_step, self._plan.flops_until(step))
        row = {**dict(zip(("step", "tokens", "flops"), position, strict=True)), **values}
        with name_file(self._path):
            self._file.write(self._lines([row]).encode())
            self._file.flush()

    def add_image(self, step: int, name: str, image_HWC: Tensor) -> None:
        """Leave pictures out: a table has none."""

    def add_histogram(self, step: int, name: str, values_N: Tensor) -> None:
        """Leave distributions out."""

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write_all(self) -> None:
        self.close()
        records = list(self._read())
        self._columns = list(dict.fromkeys(key for record in records for key in record))
        head = self._lines([dict(zip(self._columns, self._columns, strict=True))])
        write_text(self._path, head + self._lines(records) if records else "")
        self._file = open_to_append(self._path)

    def _lines(self, rows: Iterable[Mapping[str, Any]]) -> str:
        lines = io.StringIO()
        writer = csv.DictWriter(lines, self._columns, restval="", lineterminator="\n")
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
        return lines.getvalue()


def _cell(value: Any) -> Any:
    """Return what stands for a value: nothing where it is not finite, as null in JSON."""
    return "" if isinstance(value, float) and not math.isfinite(value) else value
