"""Continuations as they come, and how they are written."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console

from modtrain.common.atomic_io import written_aside
from modtrain.inference.generate.decoder import End, Finish, Token
from modtrain.inference.generate.text import Piece, TextStream, marked, styled


@dataclass
class Continuation:
    """What has come of one continuation.

    request: what was asked for, its prompt under ``prompt``. prompt: turns the prompt's tokens into
    text where it is to be given; None where not. pieces: text that came and was not taken yet.
    depths: of the tokens, the prompt's included. finish: why it ended; None while it goes on.
    """

    request: dict[str, Any]
    stream: TextStream
    prompt: TextStream | None = None
    pieces: list[Piece] = field(default_factory=list)
    num_tokens: int = 0
    depths: list[int] = field(default_factory=list)
    finish: Finish | None = None

    def hear(self, event: Token | End) -> bool:
        """Take in what came. Returns whether a stop string has ended it just now."""
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

    def take(self) -> list[Piece]:
        """Return the text that came since the last call."""
        taken, self.pieces = self.pieces, []
        return taken


class Writer(Protocol):
    """Writes continuations in their order, each as early as that allows."""

    def write(self) -> None:
        """Write what can be written by now."""


class PlainWriter:
    """One text after another; the first one that goes on is written as it comes.

    On a terminal depths are colours, elsewhere subscript digits, and control characters are made
    visible. Several texts have their number between them.
    """

    def __init__(self, out: TextIO, continuations: Sequence[Continuation], most: int) -> None:
        self._out, self._continuations, self._most = out, continuations, most
        self._console = Console(file=out, highlight=False, markup=False, soft_wrap=True)
        self._place = 0
        self._has_head = False

    def write(self) -> None:
        """Write what can be written by now."""
        while self._place < len(self._continuations):
            current = self._continuations[self._place]
            pieces = current.take()
            if pieces or current.finish is not None:
                self._head()
                self._put(pieces)
            if current.finish is None:
                break
            self._put([("\n", None)])
            self._place += 1
            self._has_head = False
        self._out.flush()

    def _head(self) -> None:
        if len(self._continuations) > 1 and not self._has_head:
            self._put([(f"--- {self._place + 1} of {len(self._continuations)}\n", None)])
        self._has_head = True

    def _put(self, pieces: list[Piece]) -> None:
        if self._console.is_terminal:
            self._console.print(styled(pieces, self._most), end="")
        else:
            self._out.write(marked(pieces))


# What a line of JSON has beside the request.
OWN_KEYS = ("completion", "num_tokens", "finish", "depth", "sample")


class JSONLinesWriter:
    """A line of JSON for each continuation: the request, and what came of it."""

    def __init__(self, out: TextIO, continuations: Sequence[Continuation], depth: bool) -> None:
        self._out, self._continuations, self._depth = out, continuations, depth
        self._place = 0

    def write(self) -> None:
        """Write what can be written by now."""
        while self._place < len(self._continuations):
            current = self._continuations[self._place]
            if current.finish is None:
                break
            record = {
                **current.request,
                "completion": "".join(text for text, _ in current.take()),
                "num_tokens": current.num_tokens,
                "finish": current.finish,
            }
            if self._depth:
                record["depth"] = current.depths
            self._out.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._place += 1
        self._out.flush()


@contextmanager
def output(path: str | None) -> Iterator[TextIO]:
    """Open what continuations are written to; a file is there once it is whole."""
    if path is None:
        yield sys.stdout
        return
    target = Path(path)
    with written_aside(target, target.parent) as file:
        text = io.TextIOWrapper(file, encoding="utf-8")
        yield text
        text.flush()
        text.detach()
