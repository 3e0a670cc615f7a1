"""Text that a tokenizer has no tokens for, which it drops without a word."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tokenizers import Encoding, Tokenizer, pre_tokenizers

from modtrain.common.errors import DataError

# Of a text's characters, those that may be an unknown token's: a rare sign is no reason to leave
# a document out, a script that the vocabulary does not have is.
UNKNOWN_SHARE = 0.1
_NUM_BYTES = 256
_SHOWN = 5


@contextmanager
def encoding_with(name: str) -> Iterator[None]:
    """Raise DataError where the tokenizer ``name`` cannot encode a text at all."""
    try:
        yield
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(
            f"{name}: cannot encode the text: {error}. Add that token to its vocabulary,"
            " or train a tokenizer with tokenizer.path=null."
        ) from None


class LostText:
    """Finds the texts that a tokenizer cannot spell. name: the tokenizer's, for errors."""

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        self._tokenizer, self._name = tokenizer, name
        content = json.loads(tokenizer.to_str())
        # Unigram's unknown token has the text that it stands for: the id tells.
        self._unknown_id = content["model"].get("unk_id")
        if self._unknown_id is None and (unknown := content["model"].get("unk_token")) is not None:
            self._unknown_id = tokenizer.token_to_id(unknown)
        self.is_possible = not _has_all_bytes(tokenizer, content)
        """False for a vocabulary with all bytes, which spells every text."""

    def of(self, text: str) -> str:
        """Return which characters of ``text`` get no token, or an unknown one; empty: none, or few.

        White space counts for nothing: a tokenizer may leave it to its decoder.

        Raises:
            DataError: it cannot be encoded at all.
        """
        if not self.is_possible:
            return ""
        with encoding_with(self._name):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return self.of_pieces([(text, encoding)])

    def of_pieces(self, pieces: Sequence[tuple[str, Encoding]]) -> str:
        """The same of a text that was encoded in pieces, each with its encoding."""
        dropped: list[str] = []
        unknown: list[str] = []
        num_characters = 0
        for text, encoding in pieces:
            has_token = bytearray(len(text))
            for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                has_token[start:end] = b"\1" * (end - start)
                if token_id == self._unknown_id:
                    unknown += [c for c in text[start:end] if not c.isspace()]
            lost = (c for c, known in zip(text, has_token, strict=True) if not known)
            dropped += [character for character in lost if not character.isspace()]
            num_characters += sum(not character.isspace() for character in text)
        if dropped:
            return f"the tokenizer has no token for {_listed(dropped)}"
        if len(unknown) > UNKNOWN_SHARE * num_characters:
            share = len(unknown) / num_characters
            return f"{share:.0%} of it is unknown to the tokenizer: {_listed(unknown)}"
        return ""


def _has_all_bytes(tokenizer: Tokenizer, content: dict[str, Any]) -> bool:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if content["model"].get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(_NUM_BYTES))
    splitter = content.get("pre_tokenizer") or {}
    parts = [splitter, *splitter.get("pretokenizers", ())]
    is_byte_level = any(part.get("type") == "ByteLevel" for part in parts)
    return is_byte_level and vocabulary.keys() >= set(pre_tokenizers.ByteLevel.alphabet())


def _listed(characters: list[str]) -> str:
    distinct = list(dict.fromkeys(characters))
    more = " …" if len(distinct) > _SHOWN else ""
    return ", ".join(repr(character) for character in distinct[:_SHOWN]) + more
