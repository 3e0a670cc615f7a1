"""The records of the units' documents, merged to those of the splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modtrain.common.atomic_io import file_sha256, write_json
from modtrain.data.documents.record import (
    RECORD,
    UNIT_RECORD,
    Records,
    names_of,
    write_records,
)
from modtrain.data.prepare.encode import UnitRecord
from modtrain.data.prepare.sources import SourceFile
from modtrain.data.prepare.storage import shown_name
from modtrain.data.prepare.units import Unit
from modtrain.data.stream.prepared import DOCUMENTS_NAME, SOURCE_FILES_NAME, SideFile


@dataclass(frozen=True)
class UnitDocuments:
    """The documents of a unit in one split.

    path: its records, which count tokens and lines from the unit's start, and number its files.
    num_tokens: of all of them. lines_before: lines of the file before the unit's.
    """

    path: str
    num_tokens: int
    files: tuple[SourceFile, ...]
    lines_before: int

    @property
    def num_documents(self) -> int:
        """How many records there are."""
        return Path(self.path).stat().st_size // UNIT_RECORD.itemsize

    def records(self) -> Records:
        """Map the records, of type `UNIT_RECORD`."""
        if not self.num_documents:
            return np.empty(0, UNIT_RECORD)
        return np.memmap(self.path, UNIT_RECORD, mode="r")


def lines_before(units: Sequence[Unit], records: Sequence[UnitRecord]) -> list[int]:
    """How many lines of its file stand before each unit's; 0 where units number lines of files."""
    seen: dict[str, int] = {}
    before = []
    for unit, record in zip(units, records, strict=True):
        path = unit.files[0].path
        before.append(seen.get(path, 0) if unit.kind == "jsonl" else 0)
        seen[path] = seen.get(path, 0) + record.num_lines
    return before


def write_side_files(
    output: Path,
    files: Sequence[SourceFile],
    documents: Mapping[str, Sequence[UnitDocuments]],
    staging: Path,
) -> dict[str, SideFile]:
    """Write the documents of each split, and the names of the files that they number.

    Memory: the records of one unit.
    """
    paths = [file.path for file in files]
    numbers = {path: number for number, path in enumerate(paths)}
    names = output / SOURCE_FILES_NAME
    write_json(names, {"files": names_of([shown_name(path) for path in paths])}, staging)
    side_files = {SOURCE_FILES_NAME: SideFile(names.stat().st_size, file_sha256(names))}
    for split, units in documents.items():
        name = f"{split}/{DOCUMENTS_NAME}"
        count = sum(unit.num_documents for unit in units)
        merged = _merged(units, numbers)
        side_files[name] = write_records(output / name, count, merged, staging)
    return side_files


def _merged(units: Sequence[UnitDocuments], numbers: Mapping[str, int]) -> Iterator[Records]:
    tokens_before = 0
    for unit in units:
        records = unit.records()[list(RECORD.names or ())].astype(RECORD)
        records["start"] += tokens_before
        records["line"] += unit.lines_before
        of_file = np.array([numbers[file.path] for file in unit.files], dtype=np.uint32)
        records["file"] = of_file[records["file"]]
        tokens_before += unit.num_tokens
        yield records
