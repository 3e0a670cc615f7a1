"""Text to tokens, and tokens as printable text: their bytes, and how to display them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from tokenizers import Tokenizer

from modtrain.data.prepare.tokenizer import DocumentEncoder, check_tokenizer, parse_tokenizer

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACES = re.compile(r"^ +$|  +")
# Code points that errors="surrogateescape" gives to bytes that are not UTF-8.
_ESCAPED = 0xDC00
_NAMED = {"\n": "↵\n", "\r": "␍", "\t": "⇥"}

# The number of a token's bytes that end a character, and that character.
_Ending = tuple[int, str]


@dataclass(frozen=True)
class Piece:
    """A token as text.

    shown: printable; invisible white space is marked. A byte that is part of a character is shown
        as ⟨e2⟩, the last byte as ⟨ac €⟩.
    characters: the printable characters that the token is a part of.
    """

    shown: str
    characters: str = ""


class Vocabulary:
    """A tokenizer for encoding prompts and decoding text; ``end_id`` ends a document."""

    def __init__(self, content: bytes, name: str, end_id: int | None = None) -> None:
        """Parse the ``content`` of a tokenizer.json; ``name`` is for errors.

        end_id: the token that ended the documents of training; None finds the tokenizer's.

        Raises:
            DataError: it is not one, or has no end-of-document token.
        """
        self.end_id = check_tokenizer(content, name, end_id)[1]
        self.tokenizer = parse_tokenizer(content, name)
        self._encoder = DocumentEncoder(content, name)

    def encode(self, text: str) -> list[int]:
        """Return a prompt's tokens; for an empty prompt the token before a new document.

        Raises:
            DataError: the tokenizer cannot spell the prompt.
        """
        return self._encoder.encode_whole(text, "the prompt") or [self.end_id]


class TokenTexts:
    """Token ids to pieces of text, for byte-level tokenizers and those with byte fallback."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoder = tokenizer.decoder
        self._is_byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
        added = tokenizer.get_added_tokens_decoder()
        self._added = {number: token.content for number, token in added.items()}

    def bytes_of(self, number: int) -> bytes:
        """Return the bytes of a token; empty if the vocabulary does not have it."""
        if number in self._added:
            return self._added[number].encode()
        token = self._tokenizer.id_to_token(number)
        if token is None:
            return b""
        if self._is_byte_level:
            return byte_level_bytes(token)
        byte = BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

    def pieces(self, numbers: Sequence[int]) -> list[Piece]:
        """Return each token's piece; characters are joined across neighbouring tokens."""
        known = {number: self.bytes_of(number) for number in set(numbers)}
        contents = [known[number] for number in numbers]
        shared, ended = _shared_characters(contents)
        return [
            Piece(
                _shown(content, *ended.get(place, (0, ""))) or f"⟨token {number}⟩",
                visible(shared.get(place, "")),
            )
            for place, (number, content) in enumerate(zip(numbers, contents, strict=True))
        ]


def byte_level_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token, or the UTF-8 of an added token in plain text."""
    known = byte_alphabet()
    if all(character in known for character in token):
        return bytes(known[character] for character in token)
    return token.encode()


@cache
def byte_alphabet() -> dict[str, int]:
    """The characters that represent bytes in byte-level BPE (GPT-2's ``bytes_to_unicode``)."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + n): b for n, b in enumerate(others)}


def visible(text: str) -> str:
    """Return ``text`` with markers for invisible characters and formatting controls."""
    text = _SPACES.sub(lambda spaces: "·" * len(spaces[0]), text)
    text = "".join(map(_visible, text))
    # A combining mark without its letter would attach to the token before.
    return f"◌{text}" if text and unicodedata.category(text[0]).startswith("M") else text


def _visible(character: str) -> str:
    if character == " ":
        return character
    if character in _NAMED:
        return _NAMED[character]
    number = ord(character)
    if 0x80 <= number - _ESCAPED <= 0xFF:
        return f"⟨{number - _ESCAPED:02x}⟩"
    # Controls, formats such as direction changes, unassigned code points, separators.
    hidden = unicodedata.category(character)[0] in "CZ"
    return f"⟨U+{number:04X}⟩" if hidden else character


def _shown(content: bytes, num_bytes: int, character: str) -> str:
    """Return a token as text; its first ``num_bytes`` end a ``character`` begun before it."""
    rest = visible(content[num_bytes:].decode(errors="surrogateescape"))
    if not num_bytes:
        return rest
    before = "".join(f"⟨{byte:02x}⟩" for byte in content[: num_bytes - 1])
    return f"{before}⟨{content[num_bytes - 1]:02x} {visible(character)}⟩{rest}"


def _shared_characters(contents: Sequence[bytes]) -> tuple[dict[int, str], dict[int, _Ending]]:
    """Find the characters that span several tokens.

    Returns, by index of a token: the characters it is a part of; the one that ends in it.
    """
    owner = [place for place, content in enumerate(contents) for _ in content]
    shared: dict[int, str] = {}
    ended: dict[int, _Ending] = {}
    start = 0
    for character in b"".join(contents).decode(errors="surrogateescape"):
        end = start + len(character.encode(errors="surrogateescape"))
        first, last = owner[start], owner[end - 1]
        if first != last:
            ended[last] = sum(place == last for place in owner[start:end]), character
            for place in range(first, last + 1):
                shared[place] = shared.get(place, "") + character
        start = end
    return shared, ended
