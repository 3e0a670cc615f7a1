"""What can be wrong with a corpus, without ending the command."""

from __future__ import annotations

from dataclasses import dataclass

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
        return f"{self.path}:{self.line}: {self.detail}"


class DamagedError(Exception):
    """A file whose rest cannot be read; the text says why."""


class TooLargeError(Exception):
    """Something that would take more memory than a document may; the text says what."""
