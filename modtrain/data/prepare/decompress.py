"""The content of files, compressed or not, in pieces of bounded size."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import zstandard

from modtrain.data.prepare.flaws import DamagedError

BOM = b"\xef\xbb\xbf"
CHUNK_BYTES = 1 << 18
COMPRESSIONS = ("gz", "zst", "bz2", "xz")
# A zstd frame makes at most 128 KiB of 4 bytes, and its decompressor cannot be told where to stop.
_ZSTD_CHUNK_BYTES = 1 << 10
LEAST_MEMORY = 1 << 28
"""Bytes that a decompressor may always take. The strongest presets of xz take 65 MB, and of zstd
128 MB; a header may ask for 4 GiB."""
# That zstd itself knows.
_LARGEST_WINDOW = 1 << 31
_ERRORS = (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, EOFError)


def chunks(
    file: BinaryIO, compression: str = "", max_memory: int = LEAST_MEMORY
) -> Iterator[bytes]:
    """Yield the content of ``file`` in pieces, whatever it was compressed from.

    compression: one of COMPRESSIONS, or empty. Several members, or frames, are one content.
    max_memory: bytes that a member or frame may ask for, if more than LEAST_MEMORY; it is refused
        before they are taken.

    Raises:
        DamagedError: it cannot be decompressed, or ends before its end mark.
    """
    if compression:
        yield from _decompressed(file, compression, max(max_memory, LEAST_MEMORY))
        return
    while piece := file.read(CHUNK_BYTES):
        yield piece


def lines_of(pieces: Iterable[bytes], max_bytes: int) -> Iterator[bytes | None]:
    """Yield the lines of a file without their ends; None for one of more than ``max_bytes``."""
    # What follows the last newline waits: of a damaged file it must not be a document.
    waiting: list[bytes] = []
    size = 0
    for piece in pieces:
        *lines, rest = piece.split(b"\n")
        for line in lines:
            is_too_large = size + len(line) > max_bytes
            yield None if is_too_large else b"".join([*waiting, line])
            waiting, size = [], 0
        size += len(rest)
        if size > max_bytes:
            waiting.clear()
        else:
            waiting.append(rest)
    if size:
        yield None if size > max_bytes else b"".join(waiting)


def _decompressed(file: BinaryIO, compression: str, max_memory: int) -> Iterator[bytes]:
    current = None
    while data := file.read(_ZSTD_CHUNK_BYTES if compression == "zst" else CHUNK_BYTES):
        if current is not None and current.eof:
            # Zeros may follow a member; no member or frame begins with one.
            data = data.lstrip(b"\0")
        # bz2 and lzma keep what they have not used yet.
        while data or not (current is None or current.eof or _needs_input(current)):
            if current is None or current.eof:
                current = _decompressor(compression, max_memory)
            content, data = _step(current, data, compression)
            if content:
                yield content
    if current is None or not current.eof:
        raise DamagedError("the compressed file is cut short")


def _needs_input(decompressor: Any) -> bool:
    return bool(getattr(decompressor, "needs_input", True))


def _step(decompressor: Any, data: bytes, compression: str) -> tuple[bytes, bytes]:
    """Return a piece of content, and the data that are left for the next step."""
    bound = [] if compression == "zst" else [CHUNK_BYTES]
    try:
        content = decompressor.decompress(data, *bound)
    except _ERRORS as error:
        # A larger window than zstd's limit, or a dictionary than xz's.
        hint = "; max_document_bytes may be raised to it" if "emory" in str(error) else ""
        raise DamagedError(f"cannot be decompressed: {error}{hint}") from error
    if decompressor.eof:
        return content, decompressor.unused_data.lstrip(b"\0")
    return content, decompressor.unconsumed_tail if compression == "gz" else b""


def _decompressor(compression: str, max_memory: int) -> Any:
    """All have ``decompress``, ``eof`` and ``unused_data``."""
    if compression == "gz":
        return zlib.decompressobj(wbits=31)
    if compression == "bz2":
        return bz2.BZ2Decompressor()
    if compression == "xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=max_memory)
    window = min(max_memory, _LARGEST_WINDOW)
    return zstandard.ZstdDecompressor(max_window_size=window).decompressobj()
