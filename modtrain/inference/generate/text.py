"""Tokens to text as they come, up to a stop string; and text that shows each token's depth."""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from rich.color import Color
from rich.style import Style
from rich.text import Text
from tokenizers import Tokenizer, decoders

from modtrain.inference.token_text import byte_level_bytes

Piece = tuple[str, Any]
"""A text, and the mark of the token that it came from."""

# As red, green, blue. Between them the luminance hardly changes, so that each colour stands out
# from a black ground and from a white one; what changes is how vivid they are.
DIM = (118, 118, 118)
BRIGHT = (217, 83, 0)

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
# A model may spell out what would take over the terminal: shown as pictures instead.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROLS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class TextStream:
    """Turns tokens into text as they come; a stop string ends it.

    All the pieces together are ``tokenizer.decode`` of all the tokens, which leaves special tokens
    out, cut before the first stop string. First is the one that is complete first; of those that
    end at the same character, the longest. So the text does not depend on how it is cut in tokens.
    A character made of several tokens carries the mark of the last of them.

    The library's DecodeStream is not used: it raises where bytes are no UTF-8, and decodes all
    that it holds back anew with each token.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, before: Iterable[int] = ()
    ) -> None:
        """Begin a text.

        before: the tokens that it goes on from, such as a prompt's. They give no text; but some
        tokenizers drop a space at the very beginning, and this one is not to be dropped.

        Raises:
            ValueError: a stop string is empty.
        """
        if "" in stop:
            raise ValueError("a stop string is empty: it would stop everything")
        self.stopped = False
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._given: list[str] = []
        self._held: deque[Piece] = deque()
        self._decoder: _Decoder = (
            _Bytes(tokenizer)
            if isinstance(tokenizer.decoder, decoders.ByteLevel)
            else _Windows(tokenizer)
        )
        for token_id in before:
            self._decoder.push(token_id, None)
        self._decoder.finish()

    @property
    def text(self) -> str:
        """Everything returned so far."""
        return "".join(self._given)

    def push(self, token_id: int, mark: Any = None) -> list[Piece]:
        """Return the text that is certain now, in pieces; nothing once it has stopped."""
        return [] if self.stopped else self._take(self._decoder.push(token_id, mark))

    def finish(self) -> list[Piece]:
        """Return what was held back; bytes that are no character yet are U+FFFD."""
        if self.stopped:
            return []
        pieces = self._take(self._decoder.finish())
        return pieces if self.stopped else pieces + self._release(self._num_held)

    @property
    def _num_held(self) -> int:
        return sum(len(text) for text, _ in self._held)

    def _take(self, pieces: list[Piece]) -> list[Piece]:
        self._held.extend(pieces)
        # What is held is shorter than a stop string: the cost of a token does not grow.
        window = "".join(text for text, _ in self._held)
        starts = [(window.find(stop), stop) for stop in self._stop]
        found = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if found:
            self.stopped = True
            return self._release(min(found)[1])
        return self._release(len(window) - self._num_uncertain(window))

    def _num_uncertain(self, window: str) -> int:
        """Return the length of the longest end that a stop string could begin with."""
        for length in range(min(self._longest - 1, len(window)), 0, -1):
            tail = window[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0

    def _release(self, count: int) -> list[Piece]:
        """Return the first ``count`` characters held."""
        released: list[Piece] = []
        while count > 0:
            text, mark = self._held.popleft()
            released.append((text[:count], mark))
            if len(text) > count:
                self._held.appendleft((text[count:], mark))
            count -= len(text)
        self._given.extend(text for text, _ in released)
        return released


class _Decoder(Protocol):
    """Tokens to text, holding back what later tokens could change."""

    def push(self, token_id: int, mark: Any) -> list[Piece]: ...

    def finish(self) -> list[Piece]: ...


class _Tokens:
    """The tokens that a text shows: not the special ones, nor numbers without a token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {number for number, token in added.items() if token.special}

    def __getitem__(self, token_id: int) -> str | None:
        if token_id in self._special:
            return None
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token


class _Bytes:
    """The decoder of byte-level tokenizers, whose tokens are bytes in disguise."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokens = _Tokens(tokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._mark: Any = None

    def push(self, token_id: int, mark: Any) -> list[Piece]:
        token = self._tokens[token_id]
        if token is None:
            return []
        self._mark = mark
        text = self._utf8.decode(byte_level_bytes(token))
        return [(text, mark)] if text else []

    def finish(self) -> list[Piece]:
        text = self._utf8.decode(b"", final=True)
        return [(text, self._mark)] if text else []


class _Windows:
    """All other decoders: what the library makes of a token behind the one before it.

    Where bytes that are no token stand as ``<0x..>``, one wrong byte changes the text of a whole
    run of them (`decoders.ByteFallback`): a run is held back until it ends.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens = _Tokens(tokenizer)
        decoder = tokenizer.decoder
        self._falls_back = decoder is not None and b'"ByteFallback"' in decoder.__getstate__()
        self._context: list[int] = []
        self._run: list[int] = []
        self._mark: Any = None

    def push(self, token_id: int, mark: Any) -> list[Piece]:
        token = self._tokens[token_id]
        if token is None:
            return []
        if self._falls_back and _BYTE.fullmatch(token):
            self._run.append(token_id)
            self._mark = mark
            return []
        pieces = self.finish() + self._added([token_id], mark)
        self._context = [token_id]
        return pieces

    def finish(self) -> list[Piece]:
        pieces = self._added(self._run, self._mark) if self._run else []
        self._context = self._context + self._run
        self._run = []
        return pieces

    def _added(self, token_ids: list[int], mark: Any) -> list[Piece]:
        before: str = self._tokenizer.decode(self._context)
        text: str = self._tokenizer.decode(self._context + token_ids)[len(before) :]
        return [(text, mark)] if text else []


def styled(pieces: Iterable[tuple[str, int | None]], most: int) -> Text:
    """Return the pieces coloured by depth used, dim for 0 to bright for ``most``.

    A mark of None, as a prompt's, leaves a piece as it is. Control characters other than newline
    and tab become pictures of themselves.

    Raises:
        ValueError: a depth is not in 0 to ``most``.
    """
    text = Text()
    for piece, depth in pieces:
        style = "" if depth is None else Style(color=_colour(depth, most))
        text.append(piece.translate(_CONTROLS), style)
    return text


def _colour(depth: int, most: int) -> Color:
    if not 0 <= depth <= most:
        raise ValueError(f"a token of depth {depth} is not in 0 to {most}")
    share = depth / most if most else 1.0
    red, green, blue = (low + share * (high - low) for low, high in zip(DIM, BRIGHT, strict=True))
    return Color.from_rgb(red, green, blue)


def marked(pieces: Iterable[tuple[str, int | None]]) -> str:
    """Return the pieces, each followed by its depth in subscript digits: for want of colours.

    A mark of None adds nothing.
    """
    return "".join(
        piece if depth is None else piece + str(depth).translate(_SUBSCRIPTS)
        for piece, depth in pieces
    )
