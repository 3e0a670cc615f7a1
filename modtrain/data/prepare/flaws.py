"""What can be wrong with a corpus, without ending the command."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from modtrain.common.printable import printable

# Of a name in a message.
_NAME_CHARS = 80

FLAW_KINDS = {
    "bad_json": "lines that are not JSON",
    "bad_csv": "rows that are not CSV",
    "no_text": "lines or rows without text in the text column",
    "empty": "empty documents",
    "invalid_utf8": "documents that are not UTF-8",
    "damaged": "files that are cut short or corrupt, in whole or in part",
    "too_large": "documents, or what holds them, of more than max_document_bytes",
    "lost_text": "documents with text that the tokenizer cannot spell",
    "bad_token": "documents with token numbers that the tokenizer does not have",
    "repeated": "documents whose text stands in an earlier one",
    "several_texts": "samples of archives with several members that could be their text",
    "not_a_file": "members of archives that are links, devices or sparse",
}


@dataclass(frozen=True)
class Flaw:
    """Something in the corpus that gives no document.

    kind: one of FLAW_KINDS.
    line: counted from 1; in a ``jsonl`` unit from the start of the unit. In files of rows, of
        archive members or of token documents: the number of the row, member or document.
    """

    kind: str
    path: str
    line: int
    detail: str

    def __str__(self) -> str:
        return printable(f"{self.path}:{self.line}: {self.detail}")


def shown_names(names: Iterable[str], at_most: int = 20) -> str:
    """Return names that stand in a file, which may be long and many, for a message."""
    shown = [
        printable(name if len(name) <= _NAME_CHARS else f"{name[:_NAME_CHARS]}…")
        for name in islice(names, at_most + 1)
    ]
    return ", ".join([*shown[:at_most], "…"] if len(shown) > at_most else shown)


class DamagedError(Exception):
    """A file whose rest cannot be read; the text says why."""


class TooLargeError(Exception):
    """Something that would take more memory than a document may; the text says what."""
