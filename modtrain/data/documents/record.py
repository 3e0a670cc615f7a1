"""What is stored of a document: 36 bytes.

``train/documents.npy`` and ``valid/documents.npy`` have one record a document, in the order of the
split's tokens; ``source_files.json`` names the files that the records number.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modtrain.common.atomic_io import atomic_writer, file_sha256
from modtrain.data.remote.urls import is_url
from modtrain.data.stream.prepared import SideFile

Records = NDArray[Any]

RECORD = np.dtype([("start", "<u8"), ("line", "<u8"), ("file", "<u4"), ("hash", "<u8", (2,))])
"""start: the first token's place in the split's tokens, documents end to end. file: its number in
``source_files.json``. line: line, row or record, from 1. hash: BLAKE2b-128 of the whole text."""
UNIT_RECORD = np.dtype([*RECORD.descr, ("num_bytes", "<u8")])
"""While a corpus is prepared: num_bytes are those of the part of the text that is in the split."""
HASH_BYTES = 16
_PACKED = struct.Struct(f"<QQI{HASH_BYTES}sQ")


def text_hash(text: str) -> bytes:
    """The hash of a document's text: equal texts are taken for equal documents."""
    return content_hash(text.encode())


def content_hash(content: bytes) -> bytes:
    """The hash of a document's bytes: of its text, or of the token numbers that it came as."""
    return hashlib.blake2b(content, digest_size=HASH_BYTES).digest()


def packed_record(start: int, line: int, file: int, hashed: bytes, num_bytes: int) -> bytes:
    """One `UNIT_RECORD` as it is stored."""
    return _PACKED.pack(start, line, file, hashed, num_bytes)


def write_records(
    path: Path,
    count: int,
    parts: Iterable[Records],
    staging: Path,
    dtype: np.dtype[Any] = RECORD,
) -> SideFile:
    """Write ``count`` records, which come in parts, as one array that `numpy.load` reads."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    with atomic_writer(path, staging) as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (count,)})
        for part in parts:
            file.write(part.tobytes())
    return SideFile(path.stat().st_size, file_sha256(path))


def names_of(paths: Sequence[str]) -> list[str]:
    """The paths without the folder that all of them are in: a prepared directory may be moved.

    The name alone of a single file.
    """
    if any(map(is_url, paths)):
        return list(paths)
    folders = [PurePath(path).parent.parts for path in paths]
    shared = 0
    for parts in zip(*folders, strict=False):
        if len(set(parts)) > 1:
            break
        shared += 1
    return [str(PurePath(*PurePath(path).parts[shared:])) for path in paths]
