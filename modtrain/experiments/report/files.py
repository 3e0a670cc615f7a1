"""Files of runs in a report: what is wrong with one leaves it out, and is said."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from modtrain.common.errors import ModtrainError
from modtrain.common.reading import MAX_YAML_BYTES, read_yaml
from modtrain.common.renamed_keys import flatten, translate

_MAX_REASON = 300
T = TypeVar("T")


def read_config(path: Path, max_bytes: int) -> dict[str, Any]:
    """Return a run's configuration by dotted key, with today's names.

    Raises:
        UnreadableError: the file cannot be read, or is no configuration.
    """
    return flatten(translate(read_yaml(path, min(max_bytes, MAX_YAML_BYTES))))


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
        except (ModtrainError, csv.Error) as error:
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
