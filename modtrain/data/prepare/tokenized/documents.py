"""From files of token numbers to documents of the tokenizer that is stored beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from modtrain.common.errors import DataError
from modtrain.data.prepare.flaws import DamagedError, Flaw
from modtrain.data.prepare.sources import SourceFile
from modtrain.data.prepare.tokenized.files import (
    Part,
    flat_parts,
    litdata_parts,
    mds_parts,
    megatron_parts,
)
from modtrain.data.prepare.tokenizer import check_tokenizer, parse_tokenizer

# Tokens that are looked at together.
_BLOCK_TOKENS = 1 << 20
_BYTES_A_TOKEN = 4
# Of a file whose documents have no known ends.
_MIN_BLOCKS = 128
# Of a byte fallback, as <0x0A>.
_BYTE_TOKEN_LENGTH = 6
_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, AttributeError),
    DamagedError,
)


class TokenDocument(NamedTuple):
    """tokens: without the end token. is_ended: whether the document ends with them.

    num_bytes: of their text.
    """

    tokens: NDArray[np.uint32]
    is_ended: bool
    num_bytes: int


class Vocabulary(NamedTuple):
    """size: of the embedding. eos_id: ends a document. num_bytes: of each token's text."""

    size: int
    eos_id: int
    num_bytes: NDArray[np.int64]

    @classmethod
    @lru_cache(maxsize=1)
    def of_file(cls, path: str, sha256: str, eos_id: int) -> Vocabulary:
        """Return that of a ``tokenizer.json`` whose checksum and end token are known."""
        content = Path(path).read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(f"{path}: changed while the corpus was read. Run prepare again.")
        size, _ = check_tokenizer(content, path, eos_id)
        tokenizer = parse_tokenizer(content, path)
        is_byte_level = "ByteLevel" in str(tokenizer.decoder)
        added = tokenizer.get_added_tokens_decoder()
        num_bytes = np.zeros(size, np.int64)
        for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
            if is_byte_level and number not in added:
                # Each byte has a character of its own.
                num_bytes[number] = len(token)
            elif len(token) == _BYTE_TOKEN_LENGTH and token.startswith("<0x"):
                num_bytes[number] = 1
            else:
                num_bytes[number] = len(token.replace("\u2581", " ").encode())
        return cls(size, eos_id, num_bytes)


class TokenReader:
    """The documents of a file of token numbers, in order, or the Flaw in their place.

    A document ends where the format says so and at each end token; without either in a file of
    single items, an item is one, and a file of nothing but tokens is cut in blocks that do not end.
    dtype: of numbers without a header. column: of MDS. max_bytes: of a document, at four a token.
    """

    def __init__(
        self,
        file: SourceFile,
        vocabulary: Vocabulary,
        *,
        default_dtype: str,
        dtype: str | None,
        column: str,
        max_bytes: int,
    ) -> None:
        self._file, self._vocabulary = file, vocabulary
        self._default_dtype = default_dtype
        self._dtype = None if dtype is None else np.dtype(dtype).newbyteorder("<").str
        self._column = column
        self._max_tokens = max_bytes // _BYTES_A_TOKEN
        self._number = 0

    @property
    def number(self) -> int:
        """Of the newest document in the file, from 1."""
        return self._number

    def __iter__(self) -> Iterator[TokenDocument | Flaw]:
        try:
            has_end = any((part == self._vocabulary.eos_id).any() for part in self._blocks())
            waiting: list[NDArray[Any]] = []
            for tokens, is_end in self._parts():
                pieces = self._split(tokens) if has_end else iter([tokens])
                waiting.append(next(pieces))
                num_ended = 0
                for piece in pieces:
                    yield from self._documents(waiting, True)
                    waiting, num_ended = [piece], num_ended + 1
                if is_end or (is_end is None and not has_end):
                    # After an end token nothing is left.
                    if any(len(part) for part in waiting) or not num_ended:
                        yield from self._documents(waiting, self._file.kind != "flat")
                    waiting = []
            if any(len(part) for part in waiting):
                yield from self._documents(waiting, True)
        except _ERRORS as error:
            yield Flaw("damaged", self._file.path, self._number + 1, str(error))

    def _parts(self) -> Iterator[Part]:
        path = Path(self._file.path)
        if self._file.kind == "megatron":
            return megatron_parts(path)
        if self._file.kind == "litdata":
            return litdata_parts(path)
        if self._file.kind == "mds":
            return mds_parts(path, self._column, self._dtype)
        return flat_parts(path, self._default_dtype, self._dtype)

    def _blocks(self) -> Iterator[NDArray[Any]]:
        for tokens, _ in self._parts():
            for start in range(0, len(tokens), _BLOCK_TOKENS):
                yield tokens[start : start + _BLOCK_TOKENS]

    def _split(self, tokens: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """Yield what stands between end tokens; what follows the last one comes last."""
        start = 0
        for block in range(0, len(tokens), _BLOCK_TOKENS):
            is_end = tokens[block : block + _BLOCK_TOKENS] == self._vocabulary.eos_id
            for end in (np.flatnonzero(is_end) + block).tolist():
                yield tokens[start:end]
                start = end + 1
        yield tokens[start:]

    def _documents(
        self, parts: list[NDArray[Any]], is_ended: bool
    ) -> Iterator[TokenDocument | Flaw]:
        size = sum(len(part) for part in parts)
        if not is_ended:
            # Of a small file as well there is a part to hold out.
            step = max(1, min(_BLOCK_TOKENS, -(-size // _MIN_BLOCKS)))
            for start in range(0, size, step):
                yield self._document(parts[0][start : start + step], False)
        elif size > self._max_tokens:
            self._number += 1
            detail = f"{size:,} tokens, at 4 bytes more than max_document_bytes"
            yield Flaw("too_large", self._file.path, self._number, detail)
        else:
            yield self._document(parts[0] if len(parts) == 1 else np.concatenate(parts), True)

    def _document(self, tokens: NDArray[Any], is_ended: bool) -> TokenDocument | Flaw:
        self._number += 1
        if not len(tokens):
            return Flaw("empty", self._file.path, self._number, "empty document")
        is_bad = (tokens < 0) | (tokens >= self._vocabulary.size)
        if is_bad.any():
            at = int(is_bad.argmax())
            detail = (
                f"token {tokens[at]} at place {at} of the document, and the tokenizer has"
                f" {self._vocabulary.size:,}; is tokenizer.path the one that made the file?"
            )
            return Flaw("bad_token", self._file.path, self._number, detail)
        numbers = tokens.astype(np.uint32)
        return TokenDocument(numbers, is_ended, int(self._vocabulary.num_bytes[numbers].sum()))
