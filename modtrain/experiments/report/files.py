"""Files of runs, read as data: their size, kind and form are checked, and nothing is executed."""

from __future__ import annotations

import csv
import json
import math
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from modtrain.common.errors import DataError
from modtrain.common.renamed_keys import flatten, translate

MAX_CONFIG_BYTES = 2**20
_MAX_YAML_DEPTH = 20
_MAX_REASON = 300
T = TypeVar("T")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class UnreadableError(DataError):
    """A file of a run that cannot be used; the message names the file and the reason."""


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file of at most ``max_bytes``.

    Raises:
        UnreadableError: it is missing, larger, or no regular file.
    """
    try:
        # A pipe without a writer would block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableError(f"{path.name} is not a file")
            content = file.read(max_bytes + 1) if status.st_size <= max_bytes else b""
    except FileNotFoundError:
        raise UnreadableError(f"{path.name} is missing") from None
    except OSError as error:
        raise UnreadableError(f"{path.name} cannot be read: {error.strerror}") from None
    if max(len(content), status.st_size) > max_bytes:
        raise UnreadableError(f"{path.name} is larger than {max_bytes:,} bytes (max_bytes)")
    return content


def read_text(path: Path, max_bytes: int) -> str:
    """Return the text of a file, with a replacement for what is not UTF-8.

    Raises:
        UnreadableError: as for `read_bytes`.
    """
    return read_bytes(path, max_bytes).decode(errors="replace")


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UnreadableError: the file cannot be read, or has something else in it.
    """
    content = parse_object(read_bytes(path, max_bytes))
    if content is None:
        raise UnreadableError(f"{path.name} is not a JSON object")
    return content


def parse_object(content: bytes) -> dict[str, Any] | None:
    """Return the object that ``content`` is in JSON; None if it is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_config(path: Path, max_bytes: int) -> dict[str, Any]:
    """Return a run's configuration by dotted key, with today's names.

    Raises:
        UnreadableError: the file cannot be read, or is no configuration.
    """
    content = read_bytes(path, min(max_bytes, MAX_CONFIG_BYTES))
    try:
        _check_yaml(content)
        loaded = yaml.load(content, _LOADER)  # noqa: S506  (it is a safe loader)
        if not isinstance(loaded, dict):
            raise ValueError("it is not a run's configuration")
        return flatten(translate(loaded))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnreadableError(f"{path.name} cannot be read: {reason}") from None


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


def read_each(
    root: Path,
    directories: Iterable[Path],
    kind: str,
    file_name: str,
    parse: Callable[[str, Path, Path], T],
) -> tuple[list[T], list[str]]:
    """Parse the file of this name in each of ``directories`` that has one.

    kind: what it is, for messages. parse: from the name of the directory below ``root``, the
    directory and the file.

    Returns the results, and what is wrong with the other files.
    """
    results, problems = [], []
    for directory in directories:
        path, name = directory / file_name, printable(str(directory.relative_to(root)))
        if not path.exists():
            continue
        try:
            results.append(parse(name, directory, path))
        except (DataError, csv.Error) as error:
            reason = " ".join(str(error).split())[:_MAX_REASON]
            problems.append(printable(f"{name}: {reason}: the {kind} is left out."))
    return results, problems


def number(value: object) -> float | None:
    """Return a finite number as a float, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def printable(text: str) -> str:
    """Return ``text`` as valid UTF-8: names of files may be any bytes."""
    return os.fsencode(text).decode(errors="replace")
