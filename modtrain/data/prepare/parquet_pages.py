"""Sizes of the pages of a Parquet file, read from their headers before a page is decompressed.

The headers are Thrift structures in the compact protocol; fields are those of the format's
``PageHeader`` (https://parquet.apache.org/docs/file-format/data-pages).
"""

from __future__ import annotations

import struct
from typing import Any, BinaryIO, NamedTuple

_MAX_HEADER_BYTES = 1 << 14
# Where the length of the footer stands, before the mark that ends the file.
_TAIL_BYTES = 8
_MAX_FOOTER_BYTES = 1 << 28
_UNCOMPRESSED_SIZE, _COMPRESSED_SIZE = 2, 3
# The headers of a page of data, of the two versions, and in them the number of values.
_DATA_HEADERS, _NUM_VALUES = (5, 8), 1
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_MAX_DEPTH = 16


def check_footer(file: BinaryIO, size: int) -> None:
    """Raise ValueError for a footer that takes too much memory, or more than the file has."""
    file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
    if len(tail) < _TAIL_BYTES or tail[4:] not in (b"PAR1", b"PARE"):
        raise ValueError("it does not end as Parquet")
    (length,) = struct.unpack("<I", tail[:4])
    if length > min(_MAX_FOOTER_BYTES, size):
        raise ValueError(f"its footer has {length:,} bytes")


class ChunkPages(NamedTuple):
    """The pages of a column chunk, as their headers have them.

    largest: bytes of the largest one, decompressed or not. num_values: of all of them; in a list
    each item is one.
    """

    largest: int
    num_values: int


def chunk_pages(file: BinaryIO, column: Any) -> ChunkPages:
    """Return what the pages of a column chunk would take.

    column: its ``ColumnChunkMetaData``. Raises ValueError where a header cannot be read.
    """
    largest = num_values = 0
    starts = [column.data_page_offset]
    if column.has_dictionary_page and column.dictionary_page_offset is not None:
        starts.append(column.dictionary_page_offset)
    at = min(start for start in starts if start > 0)
    end = at + column.total_compressed_size
    while at < end:
        file.seek(at)
        reader = _Compact(file.read(_MAX_HEADER_BYTES))
        uncompressed, compressed, count = _sizes(reader)
        largest = max(largest, uncompressed, compressed)
        num_values += count
        at += reader.at + compressed
    return ChunkPages(largest, num_values)


def _sizes(reader: _Compact) -> tuple[int, int, int]:
    """Return the two sizes of a page header, and how many values its page has."""
    try:
        fields = reader.struct(0)
    except IndexError:
        raise ValueError("a page's header is cut short") from None
    uncompressed, compressed = fields.get(_UNCOMPRESSED_SIZE), fields.get(_COMPRESSED_SIZE)
    if not isinstance(uncompressed, int) or not isinstance(compressed, int):
        raise ValueError("a page's header has no sizes")
    headers = [fields[number] for number in _DATA_HEADERS if number in fields]
    counts = [header.get(_NUM_VALUES, -1) for header in headers if isinstance(header, dict)]
    if min(uncompressed, compressed, *counts) < 0:
        raise ValueError("a page's header has a negative size")
    return uncompressed, compressed, sum(counts)


class _Compact:
    """Reads the integers of a structure and of those in it, and passes by everything else."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def struct(self, depth: int) -> dict[int, Any]:
        if depth > _MAX_DEPTH:
            raise ValueError("a page's header is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while byte := self._byte():
            kind = byte & 15
            number = number + (byte >> 4) if byte >> 4 else self._zigzag()
            if kind in (_I16, _I32, _I64):
                fields[number] = self._zigzag()
            elif kind == _STRUCT:
                fields[number] = self.struct(depth + 1)
            elif kind not in (_TRUE, _FALSE):
                self._skip(kind, depth)
        return fields

    def _skip(self, kind: int, depth: int) -> None:
        if kind == _STRUCT:
            self.struct(depth + 1)
        elif kind == _BINARY:
            self._pass_by(self._varint())
        elif kind in (_BYTE, _DOUBLE, _TRUE, _FALSE):
            self._pass_by(8 if kind == _DOUBLE else 1)
        elif kind in (_I16, _I32, _I64):
            self._varint()
        elif kind in (_LIST, _SET):
            byte = self._byte()
            count = self._varint() if byte >> 4 == 15 else byte >> 4
            for _ in range(min(count, _MAX_HEADER_BYTES)):
                self._skip(byte & 15, depth + 1)
        else:
            raise ValueError("a page's header is damaged")

    def _byte(self) -> int:
        value = self._data[self.at]
        self.at += 1
        return value

    def _pass_by(self, count: int) -> None:
        self.at += count

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 63:
                raise ValueError("a page's header is damaged")
        return value | byte << shift

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
