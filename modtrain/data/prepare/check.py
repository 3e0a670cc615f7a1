"""Whether what a reader found is a document: its size, its encoding, that there is text."""

from __future__ import annotations

import json
import re
from typing import Any

from modtrain.data.prepare.flaws import Flaw
from modtrain.data.prepare.text_field import NoTextError, TextField

# What a value of JSON takes as a Python object, about, and so many bytes for all of a record: at
# least, and times what its text may have.
_VALUE_BYTES = 64
_MIN_RECORD_BYTES, _RECORD_TIMES = 1 << 26, 4
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


class DocumentCheck:
    """What every reader asks of a document.

    field: where a record has its text. max_bytes: of a document's text, and of what holds it.
    place: path and line of the newest document.
    """

    def __init__(self, field: TextField, max_bytes: int) -> None:
        self.field, self.max_bytes = field, max_bytes
        self.place = ("", 1)

    def too_large(self, path: str, line: int, what: str = "", limit: int = 0) -> Flaw:
        """Return the flaw of something larger than a document may be, or than a higher limit."""
        bound = f"max_document_bytes={self.max_bytes:,}"
        bound = f"{limit:,}; raise {bound}" if limit > self.max_bytes else bound
        detail = f"{what or 'more'} than {bound}"
        return Flaw("too_large", path, line, detail)

    def of_text(self, content: object, path: str, line: int) -> str | Flaw:
        """Return the document that ``content``, text or its bytes, is."""
        if isinstance(content, bytes) and len(content) > self.max_bytes:
            return self.too_large(path, line)
        text = decoded(content, path, line) if isinstance(content, bytes) else content
        if isinstance(text, Flaw):
            return text
        if not isinstance(text, str):
            what = "no" if text is None else type(text).__name__
            return Flaw("no_text", path, line, f"{what} text in {self.field}")
        flaw = self._flaw_of(text, path, line)
        if flaw is None:
            self.place = (path, line)
        return flaw or text

    def _flaw_of(self, text: str, path: str, line: int) -> Flaw | None:
        if not text.strip():
            return Flaw("empty", path, line, "empty document")
        try:
            size = len(text) if text.isascii() else len(text.encode("utf-8"))
        except UnicodeEncodeError:
            # JSON can spell half a surrogate pair, which no UTF-8 can.
            return Flaw("invalid_utf8", path, line, "not UTF-8: an unpaired surrogate")
        return self.too_large(path, line) if size > self.max_bytes else None

    def of_record(self, record: Any, path: str, line: int) -> str | Flaw:
        """Return the document in a record with several fields."""
        try:
            return self.of_text(self.field.of(record), path, line)
        except NoTextError as error:
            return Flaw("no_text", path, line, str(error))

    def of_json(
        self, content: bytes, path: str, line: int, hint: str, more: dict[str, str] | None = None
    ) -> str | Flaw:
        """Return the document in a JSON object.

        hint: what the file should have, for errors. more: further fields of the record.
        """
        text = decoded(content, path, line)
        if isinstance(text, Flaw):
            return text
        limit = max(_RECORD_TIMES * self.max_bytes, _MIN_RECORD_BYTES)
        if (count := _num_values(content, limit // _VALUE_BYTES)) is not None:
            what = f"a record of {count:,} values, at {_VALUE_BYTES} bytes more"
            return self.too_large(path, line, what, limit)
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            return Flaw("bad_json", path, line, f"not JSON: {error}; {hint}")
        if more and isinstance(record, dict):
            record = {**more, **record}
        return self.of_record(record, path, line)


def _num_values(content: bytes, at_most: int) -> int | None:
    """Return how many values JSON text has, about; None where they are not more than ``at_most``.

    Two bytes may be a list of 56.
    """
    if len(content) <= at_most or _count(content) <= at_most:
        return None
    # Text may have as many commas.
    count = _count(_STRING.sub(b"", content))
    return count if count > at_most else None


def _count(content: bytes) -> int:
    return sum(content.count(mark) for mark in (b",", b"[", b"{"))


def decoded(content: bytes, path: str, line: int) -> str | Flaw:
    """Return the text of UTF-8 bytes; ``line`` is that of their beginning."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        return Flaw("invalid_utf8", path, line, f"not UTF-8: {error.reason}")
