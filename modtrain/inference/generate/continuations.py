"""Continuations in progress, and writers for them."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from modtrain.common.atomic_io import atomic_writer
from modtrain.common.console import plain_console
from modtrain.inference.generate.decoder import End, Finish, Token
from modtrain.inference.generate.text_stream import Piece, TextStream, color_by_depth, mark_depth


@dataclass
class Continuation:
    """The state of one continuation.

    request: the user's request, with its prompt under ``prompt``. prompt: decodes the prompt's
    tokens if they are to be written; else None. pieces: text that was not popped yet. depths: of
    the tokens, the prompt's included. finish: why it ended; None while it is running.
    """

    request: dict[str, Any]
    stream: TextStream
    prompt: TextStream | None = None
    pieces: list[Piece] = field(default_factory=list)
    num_tokens: int = 0
    depths: list[int] = field(default_factory=list)
    finish: Finish | None = None

    def push(self, event: Token | End) -> bool:
        """Process an event. Returns whether it completed a stop string."""
        if isinstance(event, End):
            self._end_prompt()
            self.pieces += self.stream.finish()
            self.finish = "stop" if self.stream.stopped else event.reason
            return False
        if event.depth is not None:
            self.depths.append(event.depth)
        if event.is_prompt:
            if self.prompt is not None:
                self.pieces += self.prompt.push(event.id, event.depth)
            return False
        self._end_prompt()
        self.num_tokens += 1
        self.pieces += self.stream.push(event.id, event.depth)
        if self.stream.stopped:
            self.finish = "stop"
        return self.stream.stopped

    def _end_prompt(self) -> None:
        if self.prompt is not None:
            self.pieces += self.prompt.finish()
            self.prompt = None

    def pop_pieces(self) -> list[Piece]:
        """Return the text since the last call."""
        pieces, self.pieces = self.pieces, []
        return pieces


class PlainWriter:
    """One text after another; the first unfinished one is streamed.

    On a terminal depths are colours, elsewhere subscript digits, and control characters are made
    visible. Several texts are numbered.
    """

    def __init__(self, out: TextIO, continuations: Sequence[Continuation], max_depth: int) -> None:
        self._out, self._continuations, self._max_depth = out, continuations, max_depth
        self._console = plain_console(file=out, highlight=False, soft_wrap=True)
        self._index = self._num_headings = 0

    def write(self) -> None:
        """Write what is available."""
        while self._index < len(self._continuations):
            current = self._continuations[self._index]
            pieces = current.pop_pieces()
            if pieces or current.finish is not None:
                self._write_heading()
                self._write_pieces(pieces)
            if current.finish is None:
                break
            self._write_pieces([("\n", None)])
            self._index += 1
        self._out.flush()

    def _write_heading(self) -> None:
        """Number the current text, once."""
        count = len(self._continuations)
        if count > 1 and self._num_headings == self._index:
            self._num_headings += 1
            self._write_pieces([(f"--- {self._num_headings} of {count}\n", None)])

    def _write_pieces(self, pieces: list[Piece]) -> None:
        if self._console.is_terminal:
            self._console.print(color_by_depth(pieces, self._max_depth), end="")
        else:
            self._out.write(mark_depth(pieces))


# The keys of an output line besides the request's.
OUTPUT_KEYS = ("completion", "num_tokens", "finish", "depth", "sample")


class JSONLinesWriter:
    """A line of JSON for each continuation: the request and the result."""

    def __init__(self, out: TextIO, continuations: Sequence[Continuation], depth: bool) -> None:
        self._out, self._continuations, self._depth = out, continuations, depth
        self._index = 0

    def write(self) -> None:
        """Write what is available."""
        while self._index < len(self._continuations):
            current = self._continuations[self._index]
            if current.finish is None:
                break
            record = {
                **current.request,
                "completion": "".join(text for text, _ in current.pop_pieces()),
                "num_tokens": current.num_tokens,
                "finish": current.finish,
            }
            if self._depth:
                record["depth"] = current.depths
            self._out.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._index += 1
        self._out.flush()


@contextmanager
def output(path: str | None) -> Iterator[TextIO]:
    """Open the output; a file appears when it is complete."""
    if path is None:
        yield sys.stdout
        return
    target = Path(path)
    with atomic_writer(target, target.parent) as file:
        text = io.TextIOWrapper(file, encoding="utf-8")
        yield text
        text.flush()
        text.detach()
