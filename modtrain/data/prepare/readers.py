"""From a unit of the corpus to its documents, and to what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO

from modtrain.data.prepare.check import DocumentCheck
from modtrain.data.prepare.csv_rows import DELIMITERS, csv_documents
from modtrain.data.prepare.decompress import BOM, CHUNK_BYTES, chunks, lines_of
from modtrain.data.prepare.flaws import DamagedError, Flaw
from modtrain.data.prepare.rows import arrow_documents, parquet_documents
from modtrain.data.prepare.sources import SourceFile
from modtrain.data.prepare.storage import open_source
from modtrain.data.prepare.tar_samples import tar_documents
from modtrain.data.prepare.text_field import TextField
from modtrain.data.prepare.units import Unit

_LINE_HINT = "each line holds one whole JSON object"


class UnitReader:
    """The documents of one unit, in order, as text or as the Flaw in their place.

    max_bytes: of a document's text, and of what holds it; memory is bounded by it.
    separator: what ends a document in a text file; None: its end. num_lines: lines read so far
    (``jsonl`` kinds). template: of several fields, in place of the column.
    """

    def __init__(
        self,
        unit: Unit,
        text_column: str,
        max_bytes: int,
        separator: str | None = None,
        template: str | None = None,
    ) -> None:
        self.unit = unit
        self.max_bytes = max_bytes
        self.separator = separator
        self.num_lines = 0
        self._check = DocumentCheck(TextField(text_column, template), max_bytes)

    @property
    def place(self) -> tuple[str, int]:
        """Path and line of the newest document."""
        return self._check.place

    def __iter__(self) -> Iterator[str | Flaw]:
        file, base = self.unit.files[0], self.unit.kind.partition(".")[0]
        if base == "text":
            for text in self.unit.files:
                yield from self._text_file(text)
        elif base == "parquet":
            groups = range(self.unit.start, self.unit.end)
            yield from parquet_documents(file, groups, self.unit.first_row, self._check)
        elif base == "arrow":
            yield from arrow_documents(file.path, self._check)
        elif base == "jsonl":
            yield from self._json_lines(file)
        else:
            with open_source(file.path) as opened:
                pieces = chunks(opened, file.compression, self.max_bytes)
                if base == "tar":
                    yield from tar_documents(pieces, file.path, self._check)
                else:
                    yield from csv_documents(pieces, file.path, DELIMITERS[base], self._check)

    def _text_file(self, file: SourceFile) -> Iterator[str | Flaw]:
        with open_source(file.path) as opened:
            pieces = chunks(opened, file.compression, self.max_bytes)
            try:
                if self.separator is not None:
                    yield from self._parts(pieces, file.path, self.separator.encode())
                else:
                    yield self._whole(pieces, file.path)
            except DamagedError as error:
                yield Flaw("damaged", file.path, 1, str(error))

    def _whole(self, pieces: Iterator[bytes], path: str) -> str | Flaw:
        content = bytearray()
        for piece in pieces:
            content += piece
            if len(content) > self.max_bytes:
                # Before anything is taken out of it: what was read is cut.
                return self._check.too_large(path, 1)
        # A document's tokens must not depend on the system that wrote it.
        whole = bytes(content).removeprefix(BOM).replace(b"\r\n", b"\n")
        return self._check.of_text(whole, path, 1)

    def _parts(self, pieces: Iterator[bytes], path: str, separator: bytes) -> Iterator[str | Flaw]:
        """The documents of a text file between separators; blank ones are none."""
        waiting, line, is_too_large = bytearray(), 1, False
        for chunk in _with_unix_lines(pieces):
            start = max(0, len(waiting) - len(separator) + 1)
            waiting += chunk
            while (at := waiting.find(separator, start)) >= 0:
                yield from self._part(bytes(waiting[:at]), path, line, is_too_large)
                line += waiting.count(b"\n", 0, at + len(separator))
                del waiting[: at + len(separator)]
                start, is_too_large = 0, False
            if len(waiting) > self.max_bytes + len(separator):
                # What may be the beginning of a separator stays.
                line += waiting.count(b"\n", 0, len(waiting) - len(separator))
                del waiting[: -len(separator)]
                is_too_large = True
        yield from self._part(bytes(waiting), path, line, is_too_large)

    def _part(
        self, content: bytes, path: str, line: int, is_too_large: bool
    ) -> Iterator[str | Flaw]:
        if is_too_large:
            yield self._check.too_large(path, line)
        elif content.strip():
            yield self._check.of_text(content, path, line)

    def _json_lines(self, file: SourceFile) -> Iterator[str | Flaw]:
        with ExitStack() as stack:
            if self.unit.kind == "jsonl":
                lines = self._range_lines()
            else:
                opened = stack.enter_context(open_source(file.path))
                lines = lines_of(chunks(opened, file.compression, self.max_bytes), self.max_bytes)
            try:
                for line in lines:
                    self.num_lines += 1
                    if line is None:
                        yield self._check.too_large(file.path, self.num_lines)
                        continue
                    is_first = self.num_lines == 1 and self.unit.start == 0
                    content = line.removeprefix(BOM) if is_first else line
                    if content.strip():
                        yield self._check.of_json(content, file.path, self.num_lines, _LINE_HINT)
            except DamagedError as error:
                yield Flaw("damaged", file.path, self.num_lines + 1, str(error))

    def _range_lines(self) -> Iterator[bytes | None]:
        """The lines that start inside the unit's byte range; None for one that is too large."""
        with open_source(self.unit.files[0].path) as file:
            if self.unit.start:
                file.seek(self.unit.start - 1)
                # Ends the line that started before the range; just a newline if none did.
                _skip_line(file, self.unit.end)
            while file.tell() < self.unit.end and (line := file.readline(self.max_bytes + 1)):
                if len(line) <= self.max_bytes or line.endswith(b"\n"):
                    yield line
                else:
                    yield None
                    _skip_line(file, self.unit.end)


def _with_unix_lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the pieces without a byte-order mark and with line ends of one byte."""
    rest, is_start = b"", True
    for piece in pieces:
        data = rest + piece
        if is_start and len(data) < len(BOM):
            rest = data
            continue
        data, is_start = data.removeprefix(BOM) if is_start else data, False
        # The other half of a line end may follow.
        rest = b"\r" if data.endswith(b"\r") else b""
        yield data[: len(data) - len(rest)].replace(b"\r\n", b"\n")
    yield rest


def _skip_line(file: BinaryIO, end: int) -> None:
    """Read to the end of the line, or of so many bytes of the file: no line starts before then."""
    while file.tell() < end and (part := file.readline(CHUNK_BYTES)):
        if part.endswith(b"\n"):
            return
