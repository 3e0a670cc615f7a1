"""Reading texts from files and standard input, and checks of input and output paths."""

from __future__ import annotations

import sys
from pathlib import Path

from modtrain.common.errors import DataError, Problem
from modtrain.common.validation import key_of

STANDARD_INPUT = "-"


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


def text_problems(config: object, prefix: str, name: str) -> list[Problem]:
    """Check that a field is valid Unicode; None passes."""
    text = getattr(config, name)
    if text is None or is_unicode(text):
        return []
    return [Problem(key_of(prefix, name), repr(text), "is not valid Unicode", "give UTF-8")]


def file_problems(config: object, prefix: str, *names: str) -> list[Problem]:
    """Find fields that name a file which does not exist; None and ``-`` pass."""
    remedy = "give a file that exists, or - for standard input"
    return [
        Problem(key_of(prefix, name), path, "is no file", remedy)
        for name in names
        if (path := getattr(config, name)) not in (None, STANDARD_INPUT)
        and not Path(path).is_file()
    ]


def output_problems(config: object, prefix: str, name: str = "output") -> list[Problem]:
    """Check that a field names a file that can be written; None passes."""
    value = getattr(config, name)
    if value is None:
        return []
    path, key = Path(value), key_of(prefix, name)
    if path.is_dir():
        return [Problem(key, value, "is a directory", "give the name of a file in it")]
    if not path.parent.is_dir():
        return [Problem(key, value, "is in a directory that does not exist", f"make {path.parent}")]
    return []
