"""Files that people, disks and other programs can touch, read as data.

A file is regular, and no larger than its reader allows: that is checked before memory is taken. It
is never executed, and nothing waits for it. A strict reader raises `UnreadableError`; what is only
told about a run goes through `read_or_set_aside`, for its loss must not block one.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml

from modtrain.common.errors import ModtrainError

MAX_YAML_BYTES = 2**20
MAX_JSON_BYTES = 2**28
MAX_LINE_BYTES = 2**24
_MAX_YAML_DEPTH = 20
_BLOCK_BYTES = 2**16
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
T = TypeVar("T")
log = logging.getLogger(__name__)


class UnreadableError(ModtrainError):
    """A file that cannot be used. The message begins with its name, without the directory."""


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file to read; a pipe or a device could block for ever.

    Raises:
        UnreadableError: it is missing, no regular file, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UnreadableError(f"{path.name} is not a file")
            yield file
    except FileNotFoundError:
        raise UnreadableError(f"{path.name} is missing") from None
    except OSError as error:
        raise UnreadableError(f"{path.name} cannot be read: {error.strerror}") from None


def read_bytes(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of a regular file of at most ``max_bytes``.

    Raises:
        UnreadableError: it is missing, larger, or no regular file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(max_bytes + 1) if size <= max_bytes else b""
    if max(len(content), size) > max_bytes:
        raise UnreadableError(f"{path.name} is larger than {max_bytes:,} bytes")
    return content


def read_text(path: Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Return the text of a file, with a replacement for what is not UTF-8.

    Raises:
        UnreadableError: as for `read_bytes`.
    """
    return read_bytes(path, max_bytes).decode(errors="replace")


def read_json(
    path: Path,
    max_bytes: int = MAX_JSON_BYTES,
    object_hook: Callable[[dict[str, Any]], Any] | None = None,
) -> dict[str, Any]:
    """Return the object in a JSON file.

    object_hook: what each object is replaced by as soon as it is read, as of `json.loads`.

    Raises:
        UnreadableError: the file cannot be read, or has something else in it.
    """
    content = parse_object(read_bytes(path, max_bytes), object_hook)
    if content is None:
        raise UnreadableError(f"{path.name} is not a JSON object")
    return content


def parse_object(
    content: bytes, object_hook: Callable[[dict[str, Any]], Any] | None = None
) -> dict[str, Any] | None:
    """Return the object that ``content`` is in JSON; None if it is none."""
    try:
        value = json.loads(content, object_hook=object_hook)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_records(
    path: Path, is_record: Callable[[dict[str, Any]], bool], max_line_bytes: int = MAX_LINE_BYTES
) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the JSON objects of a file with one a line, and the numbers of its damaged lines.

    A last line that a kill or a full disk cut is left out, and is not damaged.

    is_record: whether an object has what it needs. max_line_bytes: longer lines are damaged.

    Raises:
        UnreadableError: as for `read_bytes`; the file may have any size.
    """
    records, damaged = [], []
    with open_regular(path) as file:
        number = 0
        while line := file.readline(max_line_bytes):
            number += 1
            is_whole = line.endswith(b"\n")
            is_too_long = not is_whole and len(line) == max_line_bytes
            record = None if is_too_long else parse_object(line)
            if record is not None and is_record(record):
                records.append(record)
            elif is_too_long or (is_whole and line.strip()):
                damaged.append(number)
            while line and not line.endswith(b"\n"):
                line = file.readline(max_line_bytes)
    return records, damaged


def blocks_from_end(file: BinaryIO, max_bytes: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Iterate over the blocks of ``file`` from the last one, each with its offset.

    max_bytes: bytes from the end at which to stop; None: at the file's beginning.
    """
    offset = end = file.seek(0, os.SEEK_END)
    while offset > 0 and (max_bytes is None or end - offset < max_bytes):
        size = min(_BLOCK_BYTES, offset)
        offset -= size
        file.seek(offset)
        yield offset, file.read(size)


def lines_from_end(path: Path, max_bytes: int | None = None) -> Iterator[bytes]:
    """Iterate over the lines of ``path`` from the last one, without line ends.

    max_bytes: as of `blocks_from_end`.
    """
    # Of a line whose beginning is not read yet, the last one first.
    pieces: list[bytes] = []
    with open_regular(path) as file:
        for offset, block in blocks_from_end(file, max_bytes):
            first, *lines = block.split(b"\n")
            if lines:
                lines[-1] += b"".join(reversed(pieces))
                pieces = []
                yield from reversed(lines)
            pieces.append(first)
            if offset == 0:
                yield b"".join(reversed(pieces))


def read_yaml(path: Path, max_bytes: int = MAX_YAML_BYTES) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        UnreadableError: the file cannot be read, has something else in it, or multiplies what it
            has: by aliases, or by deep nesting.
    """
    content = read_bytes(path, max_bytes)
    try:
        _check_yaml(content)
        loaded = yaml.load(content, _LOADER)  # noqa: S506  (it is a safe loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnreadableError(f"{path.name} cannot be read: {reason}") from None
    if not isinstance(loaded, dict):
        raise UnreadableError(f"{path.name} cannot be read: it is not a mapping")
    return loaded


def read_or_set_aside(path: Path, read: Callable[[Path], T]) -> T | None:
    """Return ``read(path)``; None where the file is missing, or is no such file.

    read: raises `UnreadableError` for what it cannot use, which is renamed to ``damaged-<name>``
    with a warning.
    """
    if not os.path.lexists(path):
        return None
    try:
        return read(path)
    except UnreadableError as error:
        log.warning("%s/%s; kept as %s", path.parent, error, set_aside(path).name)
        return None


def set_aside(path: Path, reason: str = "damaged") -> Path:
    """Rename a file or directory to ``<reason>-<name>``, or a like name that is free."""
    kept = unused(path.with_name(f"{reason}-{path.name}"))
    path.rename(kept)
    return kept


def unused(path: Path) -> Path:
    """Return ``path``, or a like name that is free."""
    while os.path.lexists(path):
        path = path.with_name(path.name + "-again")
    return path


def _check_yaml(content: bytes) -> None:
    """Raise ValueError for deep nesting, which crashes the loader, and for what multiplies."""
    depth = 0
    for event in yaml.parse(content, _LOADER):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has aliases, which no run writes")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_YAML_DEPTH:
                raise ValueError("it is nested too deeply")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
