"""The documents of a sample: from which file and line, which tokens, and their text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from modtrain.common.printable import printable
from modtrain.data.documents.table import DocumentTable
from modtrain.inference.token_text import visible


@dataclass(frozen=True)
class SampleDocument:
    """What a sample has of one document.

    file, line, first, num_tokens: None where an earlier version prepared the data. file: the
    source file's name; line: line, row or record in it, from 1. first: how many tokens of the
    document are before the sample. num_tokens: of the document, its end token included. tokens: in
    the sample. text: of these, without the end token.
    """

    file: str | None
    line: int | None
    first: int | None
    num_tokens: int | None
    tokens: list[int]
    text: str

    @property
    def origin(self) -> str:
        """File and line, for people."""
        return "origin unknown" if self.file is None else printable(f"{self.file}:{self.line}")

    @property
    def extent(self) -> str:
        """Which tokens of the document they are, from 1."""
        count = len(self.tokens)
        if self.first is None or self.num_tokens is None:
            return f"{count:,} tokens"
        if count == self.num_tokens:
            return f"all {count:,} tokens"
        return f"tokens {self.first + 1:,} to {self.first + count:,} of {self.num_tokens:,}"

    def shown_text(self, max_chars: int) -> str:
        """The text with marks for what would not be seen; … where it is cut."""
        cut = self.text[:max_chars]
        return visible(cut) + (" …" if len(self.text) > max_chars else "")


def sample_documents(
    tokens: Sequence[int],
    pieces: Sequence[tuple[int, int]],
    table: DocumentTable | None,
    tokenizer: Tokenizer,
    end_id: int,
) -> list[SampleDocument]:
    """Split a sample into its documents.

    tokens: S + 1, the last target included; padding may follow. pieces: the stretches of the
    split's tokens that they are, as of `TokenDataset.document_pieces`. table: the split's
    documents; None: they end at ``end_id``.
    """

    def text_of(own: Sequence[int]) -> str:
        without_end = own[:-1] if own[-1] == end_id else own
        return tokenizer.decode(list(without_end), skip_special_tokens=False)

    if table is None:
        parts = _ended_by(tokens, end_id)
        return [SampleDocument(None, None, None, None, own, text_of(own)) for own in parts]
    documents, before = [], 0
    for start, count in pieces:
        for part in table.between(start, start + count):
            place = before + part.place
            own = list(tokens[place : place + part.stop - part.first])
            documents.append(
                SampleDocument(part.file, part.line, part.first, part.num_tokens, own, text_of(own))
            )
        before += count
    return documents


def _ended_by(tokens: Sequence[int], end_id: int) -> Iterator[list[int]]:
    own: list[int] = []
    for token in tokens:
        own.append(token)
        if token == end_id:
            yield own
            own = []
    if own:
        yield own
