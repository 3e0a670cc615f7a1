"""Reading texts from files and standard input, and checks of input and output paths."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from modtrain.common.errors import DataError, Problem, raise_if_any

STANDARD_INPUT = "-"

_log = logging.getLogger(__name__)


def read_text(path: str) -> str:
    """Return the text of a UTF-8 file, or of standard input for ``-``.

    Raises:
        DataError: it is not UTF-8.
    """
    content = sys.stdin.buffer.read() if path == STANDARD_INPUT else Path(path).read_bytes()
    try:
        # Some editors write a byte-order mark, which is not part of the text.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        name = "standard input" if path == STANDARD_INPUT else path
        raise DataError(
            f"{name}: is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None


def is_unicode(text: str) -> bool:
    """Whether ``text`` is valid Unicode; undecodable bytes of a command line are not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def text_problems(key: str, text: str | None) -> list[Problem]:
    """Check that a text is valid Unicode; None passes."""
    if text is None or is_unicode(text):
        return []
    return [Problem(key, repr(text), "is not valid Unicode", "give UTF-8")]


def file_problems(key: str, path: str | None) -> list[Problem]:
    """Check that a file exists; None and ``-``, standard input, pass."""
    if path in (None, STANDARD_INPUT) or Path(str(path)).is_file():
        return []
    return [Problem(key, path, "is no file", "give a file that exists, or - for standard input")]


def results_folder(run: Path, output: str | None) -> Path | None:
    """Return where the results of the run in ``run`` are written; None, and a warning: nowhere.

    output: a directory, which is made; None: that of the run, if it can be written.

    Raises:
        ConfigError: ``output`` cannot be written.
    """
    if output is None:
        if is_writable(run):
            return run
        _log.warning("%s is read-only: results are printed alone; output=DIR keeps them", run)
        return None
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if is_writable(folder) else "cannot be written"
    except OSError as error:
        reason = f"cannot be made: {error.strerror}"
    raise_if_any([Problem("output", output, reason, "give another directory")] if reason else [])
    return folder


def is_writable(folder: Path) -> bool:
    """Whether files can be made in ``folder``; not on a read-only mount, whoever asks."""
    return os.access(folder, os.W_OK)


def output_problems(value: str | None) -> list[Problem]:
    """Check that the file under ``output`` can be written; None passes."""
    if value is None:
        return []
    path = Path(value)
    if path.is_dir():
        return [Problem("output", value, "is a directory", "give the name of a file in it")]
    if path.parent.is_dir():
        reason = f"is in {path.parent}, which cannot be written"
        is_refused = not is_writable(path.parent)
        return [Problem("output", value, reason, "give another place")] if is_refused else []
    reason = "is in a directory that does not exist"
    return [Problem("output", value, reason, f"make {path.parent}")]
