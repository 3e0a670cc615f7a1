"""Streaming detokenization up to a stop string, and text that shows each token's depth."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from rich.color import Color
from rich.style import Style
from rich.text import Text
from tokenizers import Tokenizer, decoders

from modtrain.inference.token_text import BYTE_TOKEN, byte_level_bytes

Piece = tuple[str, Any]
"""A text, and the mark of its token."""

# From few routed parts to many, as red, green, blue. Their luminances are near each other, so that
# every one contrasts with black and with white; what changes is the hue.
DEPTH_COLORS = ((118, 118, 118), (0, 122, 204), (30, 132, 60), (168, 104, 0), (217, 60, 60))

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
# A model may generate terminal control sequences: they are shown as symbols instead.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROLS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class TextStream:
    """Decodes tokens one by one; a stop string ends the text.

    The pieces together equal ``tokenizer.decode`` of all the tokens, without special tokens, cut
    before the first stop string. The first is the one that is complete first; of those that end at
    the same character, the longest. So the text does not depend on how it is split into tokens.
    A character made of several tokens has the mark of the last of them.

    The library's DecodeStream is not used: it raises on bytes that are not UTF-8, and decodes all
    pending tokens again with each token.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, before: Iterable[int] = ()
    ) -> None:
        """Begin a text.

        before: the tokens before it, such as a prompt's. They give no text, but some tokenizers
        drop a space at the beginning of a text, which must be kept after a prompt.

        Raises:
            ValueError: a stop string is empty.
        """
        if "" in stop:
            raise ValueError("a stop string is empty: it would stop everything")
        self.stopped = False
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._released: list[str] = []
        self._pending: deque[Piece] = deque()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {number for number, token in added.items() if token.special}
        is_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._decoder = _ByteDecoder() if is_byte_level else _WindowDecoder(tokenizer)
        for token_id in before:
            self._decode(token_id, None)
        self._decoder.finish()

    @property
    def text(self) -> str:
        """Everything returned so far."""
        return "".join(self._released)

    def push(self, token_id: int, mark: Any = None) -> list[Piece]:
        """Return the text that is final now, in pieces; nothing after a stop string."""
        return [] if self.stopped else self._add(self._decode(token_id, mark))

    def finish(self) -> list[Piece]:
        """Return the pending text; bytes that do not complete a character become U+FFFD."""
        if self.stopped:
            return []
        pieces = self._add(self._decoder.finish())
        num_pending = sum(len(text) for text, _ in self._pending)
        return pieces if self.stopped else pieces + self._release(num_pending)

    def _decode(self, token_id: int, mark: Any) -> list[Piece]:
        """Decode a token; special tokens and unknown ids give no text."""
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        return [] if token is None else self._decoder.push(token_id, token, mark)

    def _add(self, pieces: list[Piece]) -> list[Piece]:
        self._pending.extend((text, mark) for text, mark in pieces if text)
        # The pending text is shorter than a stop string, so the cost per token does not grow.
        window = "".join(text for text, _ in self._pending)
        starts = [(window.find(stop), stop) for stop in self._stop]
        matches = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if matches:
            self.stopped = True
            return self._release(min(matches)[1])
        return self._release(len(window) - self._num_uncertain(window))

    def _num_uncertain(self, window: str) -> int:
        """Return the length of the longest suffix that a stop string could begin with."""
        for length in range(min(self._longest - 1, len(window)), 0, -1):
            tail = window[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0

    def _release(self, count: int) -> list[Piece]:
        """Return the first ``count`` pending characters."""
        released: list[Piece] = []
        while count > 0:
            text, mark = self._pending.popleft()
            released.append((text[:count], mark))
            if len(text) > count:
                self._pending.appendleft((text[count:], mark))
            count -= len(text)
        self._released.extend(text for text, _ in released)
        return released


class _ByteDecoder:
    """Decodes byte-level tokens, which represent bytes."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._mark: Any = None

    def push(self, token_id: int, token: str, mark: Any) -> list[Piece]:
        del token_id
        self._mark = mark
        return [(self._utf8.decode(byte_level_bytes(token)), mark)]

    def finish(self) -> list[Piece]:
        return [(self._utf8.decode(b"", final=True), self._mark)]


class _WindowDecoder:
    """Decodes all other tokens: the text that the library adds for one after the one before it.

    With byte fallback, bytes are tokens such as ``<0x0A>``, and one invalid byte changes the text
    of a whole run of them (`decoders.ByteFallback`): a run is pending until it ends.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoder = tokenizer.decoder
        self._falls_back = decoder is not None and b'"ByteFallback"' in decoder.__getstate__()
        self._context: list[int] = []
        self._run: list[int] = []
        self._mark: Any = None

    def push(self, token_id: int, token: str, mark: Any) -> list[Piece]:
        if self._falls_back and BYTE_TOKEN.fullmatch(token):
            self._run.append(token_id)
            self._mark = mark
            return []
        pieces = [*self.finish(), (self._added([token_id]), mark)]
        self._context = [token_id]
        return pieces

    def finish(self) -> list[Piece]:
        if not self._run:
            return []
        piece = (self._added(self._run), self._mark)
        self._context, self._run = self._context + self._run, []
        return [piece]

    def _added(self, token_ids: list[int]) -> str:
        before: str = self._tokenizer.decode(self._context)
        text: str = self._tokenizer.decode(self._context + token_ids)
        return text[len(before) :]


def color_by_depth(pieces: Iterable[tuple[str, int | None]], max_depth: int) -> Text:
    """Return the pieces coloured by depth, from grey for 0 to red for ``max_depth``.

    A mark of None, as a prompt's, leaves a piece as it is. Control characters other than newline
    and tab become visible symbols.

    Raises:
        ValueError: a depth is not in 0 to ``max_depth``.
    """
    text = Text()
    for piece, depth in pieces:
        style = "" if depth is None else Style(color=_color(depth, max_depth))
        text.append(piece.translate(_CONTROLS), style)
    return text


def _color(depth: int, max_depth: int) -> Color:
    if not 0 <= depth <= max_depth:
        raise ValueError(f"a token of depth {depth} is not in 0 to {max_depth}")
    share = depth / max_depth if max_depth else 1.0
    place = share * (len(DEPTH_COLORS) - 1)
    low = min(int(place), len(DEPTH_COLORS) - 2)
    mixed = (a + (place - low) * (b - a) for a, b in zip(*DEPTH_COLORS[low : low + 2], strict=True))
    return Color.from_rgb(*mixed)


def depth_legend(max_depth: int) -> Text:
    """Return a line that names the colours of `color_by_depth`."""
    text = Text("routed parts that a token entered:")
    for depth in sorted({round(max_depth * n / 8) for n in range(9)}):
        text.append(" ")
        text.append(str(depth), Style(color=_color(depth, max_depth), bold=True))
    return text


def mark_depth(pieces: Iterable[tuple[str, int | None]]) -> str:
    """Return the pieces, each followed by its depth in subscript digits unless that is None."""
    return "".join(
        piece if depth is None else piece + str(depth).translate(_SUBSCRIPTS)
        for piece, depth in pieces
    )
