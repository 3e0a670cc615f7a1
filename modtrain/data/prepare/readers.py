"""From a unit of the corpus to its documents, and to what is wrong with it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import zstandard
from pyarrow import parquet

from modtrain.data.prepare.units import Unit

FLAW_KINDS = {
    "bad_json": "lines that are not JSON",
    "no_text": "lines or rows without text in the text column",
    "empty": "empty documents",
    "invalid_utf8": "documents that are not UTF-8",
    "damaged": "compressed or parquet files that are cut short or corrupt",
    "too_large": "documents or lines of more than max_document_bytes",
    "lost_text": "documents with text that the tokenizer cannot spell",
    "repeated": "documents whose text stands in an earlier one",
}
_BOM = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1 << 18
_KEYS_SHOWN = 8
# A frame makes at most 128 KiB of 4 bytes, and its decompressor cannot be told where to stop.
_ZSTD_CHUNK_BYTES = 1 << 10


@dataclass(frozen=True)
class Flaw:
    """Something in the corpus that gives no document.

    kind: one of FLAW_KINDS.
    line: counted from 1; in a ``jsonl`` unit from the start of the unit.
    """

    kind: str
    path: str
    line: int
    detail: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.detail}"


class _CutShortError(Exception):
    """A compressed stream that ends before its end mark, or cannot be decompressed."""


class UnitReader:
    """The documents of one unit, in order, as text or as the Flaw in their place.

    max_bytes: of a document's text, and of a line that holds one; memory is bounded by it.
    separator: what ends a document in a text file; None: its end. num_lines: lines read so far
    (``jsonl`` kinds). place: path and line of the newest document.
    """

    def __init__(
        self, unit: Unit, text_column: str, max_bytes: int, separator: str | None = None
    ) -> None:
        self.unit = unit
        self.text_column = text_column
        self.max_bytes = max_bytes
        self.separator = separator
        self.num_lines = 0
        self.place = (unit.files[0].path, 1)

    def __iter__(self) -> Iterator[str | Flaw]:
        kind = self.unit.kind
        if kind == "text":
            return self._text_files()
        if kind == "parquet":
            return self._parquet_rows()
        return self._json_lines()

    def _text_files(self) -> Iterator[str | Flaw]:
        for file in self.unit.files:
            path = Path(file.path)
            if self.separator is not None:
                yield from self._parts(path, self.separator.encode())
                continue
            with path.open("rb") as opened:
                content = opened.read(self.max_bytes + 1)
            if len(content) > self.max_bytes:
                # Before anything is taken out of it: what was read is cut.
                yield self._too_large(file.path, 1)
                continue
            # A document's tokens must not depend on the system that wrote it.
            content = content.removeprefix(_BOM).replace(b"\r\n", b"\n")
            yield self._text_or_flaw(content, file.path, 1)

    def _parts(self, path: Path, separator: bytes) -> Iterator[str | Flaw]:
        """The documents of a text file between separators; blank ones are none."""
        waiting, line, is_too_large = bytearray(), 1, False
        for chunk in _with_unix_lines(path):
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
        self, content: bytes, path: Path, line: int, is_too_large: bool
    ) -> Iterator[str | Flaw]:
        if is_too_large:
            yield self._too_large(str(path), line)
        elif content.strip():
            yield self._text_or_flaw(content, str(path), line)

    def _json_lines(self) -> Iterator[str | Flaw]:
        path = self.unit.files[0].path
        lines = self._range_lines() if self.unit.kind == "jsonl" else self._stream_lines()
        try:
            for line in lines:
                self.num_lines += 1
                if line is None:
                    yield self._too_large(path, self.num_lines)
                    continue
                is_first = self.num_lines == 1 and self.unit.start == 0
                content = line.removeprefix(_BOM) if is_first else line
                if content.strip():
                    yield self._document_of_line(content, path)
        except _CutShortError as error:
            yield Flaw("damaged", path, self.num_lines + 1, str(error))

    def _document_of_line(self, line: bytes, path: str) -> str | Flaw:
        decoded = _decoded(line, path, self.num_lines)
        if isinstance(decoded, Flaw):
            return decoded
        try:
            record = json.loads(decoded)
        except (ValueError, RecursionError) as error:
            detail = f"not JSON: {error}; each line holds one whole JSON object"
            return Flaw("bad_json", path, self.num_lines, detail)
        text = record.get(self.text_column) if isinstance(record, dict) else None
        if text is None:
            detail = f"no text in {self.text_column!r}{_columns_of(record)}"
            return Flaw("no_text", path, self.num_lines, detail)
        return self._text_or_flaw(text, path, self.num_lines)

    def _too_large(self, path: str, line: int) -> Flaw:
        return Flaw("too_large", path, line, f"more than max_document_bytes={self.max_bytes:,}")

    def _text_or_flaw(self, content: object, path: str, line: int) -> str | Flaw:
        if isinstance(content, bytes) and len(content) > self.max_bytes:
            return self._too_large(path, line)
        text = _decoded(content, path, line) if isinstance(content, bytes) else content
        if isinstance(text, Flaw):
            return text
        if not isinstance(text, str):
            what = "no" if text is None else type(text).__name__
            return Flaw("no_text", path, line, f"{what} text in {self.text_column!r}")
        if not text.strip():
            return Flaw("empty", path, line, "empty document")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            # JSON can spell half a surrogate pair, which no UTF-8 can.
            return Flaw("invalid_utf8", path, line, "not UTF-8: an unpaired surrogate")
        self.place = (path, line)
        return text

    def _range_lines(self) -> Iterator[bytes | None]:
        """The lines that start inside the unit's byte range; None for one that is too large."""
        with Path(self.unit.files[0].path).open("rb") as file:
            file.seek(max(0, self.unit.start - 1))
            if self.unit.start:
                # Ends the line that started before the range; just a newline if none did.
                _skip_line(file, self.unit.end)
            while file.tell() < self.unit.end and (line := file.readline(self.max_bytes + 1)):
                if len(line) <= self.max_bytes or line.endswith(b"\n"):
                    yield line
                else:
                    yield None
                    _skip_line(file, self.unit.end)

    def _stream_lines(self) -> Iterator[bytes | None]:
        """The lines of a compressed file; None for one that is too large."""
        # What follows the last newline waits: of a damaged file it must not be a document.
        waiting: list[bytes] = []
        size = 0
        is_gzip = self.unit.kind == "jsonl.gz"
        for chunk in _decompressed(Path(self.unit.files[0].path), is_gzip):
            *lines, rest = chunk.split(b"\n")
            for line in lines:
                is_too_large = size + len(line) > self.max_bytes
                yield None if is_too_large else b"".join([*waiting, line])
                waiting, size = [], 0
            size += len(rest)
            if size > self.max_bytes:
                waiting.clear()
            else:
                waiting.append(rest)
        if size:
            yield None if size > self.max_bytes else b"".join(waiting)

    def _parquet_rows(self) -> Iterator[str | Flaw]:
        path = self.unit.files[0].path
        row = self.unit.first_row
        groups = list(range(self.unit.start, self.unit.end))
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(256, groups, columns=[self.text_column]):
                    for value in _as_bytes(batch.column(0)).to_pylist():
                        row += 1
                        yield self._text_or_flaw(value, path, row)
        except (OSError, pa.ArrowException) as error:
            yield Flaw("damaged", path, row + 1, f"not parquet, or cut short: {error}")


def _columns_of(record: object) -> str:
    """Return the keys of a line of JSON, and the one that holds its longest text."""
    if not isinstance(record, dict):
        return f": the line is no JSON object, but a {type(record).__name__}"
    names = [str(name) for name in record]
    texts = [name for name in names if isinstance(record[name], str)]
    shown = ", ".join(names[:_KEYS_SHOWN]) or "none"
    longest = max(texts, key=lambda name: len(record[name]), default=None)
    return f"; its keys: {shown}" + (f". Write text_column={longest}" if longest else "")


def _with_unix_lines(path: Path) -> Iterator[bytes]:
    """A text file in pieces, without a byte-order mark and with line ends of one byte."""
    with path.open("rb") as file:
        rest = file.read(len(_BOM)).removeprefix(_BOM)
        is_end = False
        while not is_end:
            piece = file.read(_CHUNK_BYTES)
            is_end, data = not piece, rest + piece
            # The other half of a line end may follow.
            rest = b"" if is_end or not data.endswith(b"\r") else b"\r"
            yield data[: len(data) - len(rest)].replace(b"\r\n", b"\n")


def _skip_line(file: BinaryIO, end: int) -> None:
    """Read to the end of the line, or of so many bytes of the file: no line starts before then."""
    while file.tell() < end and (part := file.readline(_CHUNK_BYTES)):
        if part.endswith(b"\n"):
            return


def _decoded(content: bytes, path: str, line: int) -> str | Flaw:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        return Flaw("invalid_utf8", path, line, f"not UTF-8: {error.reason}")


def _as_bytes(column: Any) -> Any:
    """Strings as bytes, so that one that is not UTF-8 does not take its whole batch with it."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type):
        return column.cast(pa.binary())
    return column.cast(pa.large_binary()) if pa.types.is_large_string(column.type) else column


def _decompressor(is_gzip: bool) -> Any:
    """Both kinds have ``decompress``, ``eof`` and ``unused_data``."""
    if is_gzip:
        return zlib.decompressobj(wbits=31)
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _decompressed(path: Path, is_gzip: bool) -> Iterator[bytes]:
    """The content of a file of one or more compressed members, raising where it is cut short.

    In bounded pieces, whatever it was compressed from.
    """
    current = None
    with path.open("rb") as file:
        while data := file.read(_CHUNK_BYTES if is_gzip else _ZSTD_CHUNK_BYTES):
            if current is not None and current.eof:
                # gzip allows zeros after a member; no member or frame starts with one.
                data = data.lstrip(b"\0")
            while data:
                current = _decompressor(is_gzip) if current is None or current.eof else current
                try:
                    content = current.decompress(data, *([_CHUNK_BYTES] if is_gzip else []))
                except (zlib.error, zstandard.ZstdError) as error:
                    raise _CutShortError(f"cannot be decompressed: {error}") from error
                if current.eof:
                    data = current.unused_data.lstrip(b"\0")
                else:
                    data = current.unconsumed_tail if is_gzip else b""
                if content:
                    yield content
    if current is None or not current.eof:
        raise _CutShortError("the compressed file is cut short")
