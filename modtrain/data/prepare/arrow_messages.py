"""Sizes of the record batches of an Arrow IPC file, read before one is.

The layout of the messages, which are flatbuffers, is that of Arrow's columnar format
(https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc).
"""

from __future__ import annotations

import struct
from mmap import mmap
from typing import NamedTuple

# A file has the stream between this, filled up to eight bytes, and its footer.
FILE_MAGIC = b"ARROW1\0\0"
_CONTINUATION = b"\xff\xff\xff\xff"
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_MAX_METADATA_BYTES = 1 << 26
_MAX_BUFFERS = 1 << 20


class Message(NamedTuple):
    """is_rows: whether it is a record batch. size: bytes that it takes decompressed."""

    is_rows: bool
    size: int


def stream_start(data: mmap) -> int:
    """Return where the stream begins: a file has a mark before it."""
    return len(FILE_MAGIC) if data[: len(FILE_MAGIC)] == FILE_MAGIC else 0


def messages(data: mmap) -> list[Message]:
    """Return the messages of a stream up to its end mark, or up to where it is damaged."""
    parsed: list[Message] = []
    at = stream_start(data)
    try:
        while at + 8 <= len(data):
            at += 4 * (data[at : at + 4] == _CONTINUATION)
            (length,) = struct.unpack_from("<i", data, at)
            at += 4
            if length == 0:
                break
            if not 0 < length <= min(_MAX_METADATA_BYTES, len(data) - at):
                break
            message, body = _parsed(data[at : at + length], data, at + length)
            at += length + body
            if at > len(data):
                break
            parsed.append(message)
    except (struct.error, ValueError, IndexError):
        pass
    return parsed


def _parsed(metadata: bytes, data: mmap, body_start: int) -> tuple[Message, int]:
    root = _Table(metadata, struct.unpack_from("<I", metadata, 0)[0])
    kind, body = root.number(1, "<B"), root.number(3, "<q")
    if body < 0:
        raise ValueError("a negative length")
    batch = root.table(2) if kind in (_DICTIONARY_BATCH, _RECORD_BATCH) else None
    if batch is not None and kind == _DICTIONARY_BATCH:
        batch = batch.table(1)
    size = body
    if batch is not None and batch.position(3):
        size = 0
        for offset, length in batch.structs(2, "<qq", _MAX_BUFFERS):
            if length >= 8:
                (whole,) = struct.unpack_from("<q", data, body_start + offset)
                # -1: this buffer did not become smaller, and is as it was.
                size += max(whole, length)
    return Message(kind == _RECORD_BATCH, size), body


class _Table:
    """A table of a flatbuffer, whose fields are parsed by number."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        self._fields = at - struct.unpack_from("<i", data, at)[0]
        if self._fields < 0:
            raise ValueError("a field outside of its message")

    def position(self, number: int) -> int:
        """Return where a field lies; 0: it has its default."""
        (size,) = struct.unpack_from("<H", self._data, self._fields)
        place = 4 + 2 * number
        if place + 2 > size:
            return 0
        (offset,) = struct.unpack_from("<H", self._data, self._fields + place)
        return self._at + offset if offset else 0

    def number(self, number: int, layout: str) -> int:
        at = self.position(number)
        return int(struct.unpack_from(layout, self._data, at)[0]) if at else 0

    def table(self, number: int) -> _Table:
        at = self.position(number)
        if not at:
            raise ValueError("a table that is missing")
        return _Table(self._data, at + struct.unpack_from("<I", self._data, at)[0])

    def structs(self, number: int, layout: str, at_most: int) -> list[tuple[int, int]]:
        at = self.position(number)
        if not at:
            return []
        at += struct.unpack_from("<I", self._data, at)[0]
        (count,) = struct.unpack_from("<I", self._data, at)
        if count > at_most:
            raise ValueError("too many buffers")
        size = struct.calcsize(layout)
        return [struct.unpack_from(layout, self._data, at + 4 + i * size) for i in range(count)]
