"""The corpus split into units of work, independent of the number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from modtrain.data.prepare.rows import row_groups
from modtrain.data.prepare.sources import SourceFile
from modtrain.data.prepare.storage import has_ranges
from modtrain.data.prepare.text_field import TextField

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

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from others: as its fields, without signatures of addresses."""
        return {**asdict(self), "files": [file.identity for file in self.files]}


def plan_units(
    files: Sequence[SourceFile], text_column: str, text_template: str | None = None
) -> list[Unit]:
    """Split the corpus into units, in the order of the files.

    Raises DataError for a parquet file without the columns of the text.
    """
    units: list[Unit] = []
    for kind, group in groupby(files, key=lambda file: file.kind):
        if kind.partition(".")[0] == "text":
            units += _text_units(kind, list(group))
            continue
        for file in group:
            if kind == "jsonl" and has_ranges(file.path):
                for start in range(0, file.size, LINES_UNIT_BYTES):
                    end = min(start + LINES_UNIT_BYTES, file.size)
                    units.append(Unit("jsonl", (file,), end - start, start, end))
            elif kind == "parquet":
                units += _parquet_units(file, TextField(text_column, text_template))
            elif kind == "jsonl":
                units.append(Unit(kind, (file,), file.size, 0, file.size))
            else:
                units.append(Unit(kind, (file,), file.size))
    return units


def _text_units(kind: str, files: Sequence[SourceFile]) -> Iterator[Unit]:
    batch: list[SourceFile] = []
    size = 0
    for file in files:
        if batch and size + file.size > TEXT_UNIT_BYTES:
            yield Unit(kind, tuple(batch), size)
            batch, size = [], 0
        batch.append(file)
        size += file.size
    yield Unit(kind, tuple(batch), size)


def _parquet_units(file: SourceFile, field: TextField) -> Iterator[Unit]:
    groups = row_groups(file, field)
    if groups is None:
        # The reader meets the same damage and counts it, or stops at it, as configured.
        yield Unit("parquet", (file,), file.size)
        return
    sizes = [group.num_bytes for group in groups]
    if not has_ranges(file.path):
        yield Unit("parquet", (file,), file.size, 0, len(groups))
        return
    start = first_row = 0
    while start < len(groups):
        end = start + 1
        while end < len(groups) and sum(sizes[start : end + 1]) <= PARQUET_UNIT_BYTES:
            end += 1
        share = file.size * sum(sizes[start:end]) // max(1, sum(sizes))
        yield Unit("parquet", (file,), share, start, end, first_row)
        first_row += sum(group.num_rows for group in groups[start:end])
        start = end
