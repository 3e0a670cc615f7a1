"""The corpus split into units of work, independent of the number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa
from pyarrow import parquet

from modtrain.common.errors import DataError
from modtrain.data.prepare.sources import SourceFile

TEXT_UNIT_BYTES = 8_000_000
LINES_UNIT_BYTES = 32_000_000
PARQUET_UNIT_BYTES = 32_000_000


@dataclass(frozen=True)
class Unit:
    """A piece of the corpus that one worker reads at once.

    files: several for ``text``, else one. num_bytes: on disk, for progress.
    start, end: byte range (``jsonl``: the lines that start in it) or range of row groups
        (``parquet``); 0 and 0 where a file is read whole.
    first_row: number of the first row (``parquet``), for messages.
    """

    kind: str
    files: tuple[SourceFile, ...]
    num_bytes: int
    start: int = 0
    end: int = 0
    first_row: int = 0


def plan_units(files: Sequence[SourceFile], text_column: str) -> list[Unit]:
    """Split the corpus into units, in the order of the files.

    Raises DataError for a parquet file without the column ``text_column``.
    """
    units: list[Unit] = []
    for kind, group in groupby(files, key=lambda file: file.kind):
        if kind == "text":
            units += _text_units(list(group))
            continue
        for file in group:
            if kind == "jsonl":
                for start in range(0, file.size, LINES_UNIT_BYTES):
                    end = min(start + LINES_UNIT_BYTES, file.size)
                    units.append(Unit("jsonl", (file,), end - start, start, end))
            elif kind == "parquet":
                units += _parquet_units(file, text_column)
            else:
                units.append(Unit(kind, (file,), file.size))
    return units


def _text_units(files: Sequence[SourceFile]) -> Iterator[Unit]:
    batch: list[SourceFile] = []
    size = 0
    for file in files:
        if batch and size + file.size > TEXT_UNIT_BYTES:
            yield Unit("text", tuple(batch), size)
            batch, size = [], 0
        batch.append(file)
        size += file.size
    yield Unit("text", tuple(batch), size)


def _parquet_units(file: SourceFile, text_column: str) -> Iterator[Unit]:
    try:
        footer = parquet.ParquetFile(file.path)
    except (OSError, pa.ArrowException):
        # The reader meets the same damage and counts it, or stops at it, as configured.
        yield Unit("parquet", (file,), file.size)
        return
    with footer:
        columns = footer.schema_arrow.names
        if text_column not in columns:
            raise DataError(
                f"{file.path}: has no column {text_column!r}, only {', '.join(columns)}. "
                "Set text_column to the one that holds the text."
            )
        groups = [footer.metadata.row_group(i) for i in range(footer.num_row_groups)]
    sizes = [group.total_byte_size for group in groups]
    start = first_row = 0
    while start < len(groups):
        end = start + 1
        while end < len(groups) and sum(sizes[start : end + 1]) <= PARQUET_UNIT_BYTES:
            end += 1
        share = file.size * sum(sizes[start:end]) // max(1, sum(sizes))
        yield Unit("parquet", (file,), share, start, end, first_row)
        first_row += sum(group.num_rows for group in groups[start:end])
        start = end
