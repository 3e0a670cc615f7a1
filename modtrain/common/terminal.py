"""What is printed on a terminal: the console, and tables that fit its width."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Cells of a border and the space around a column's content, and of the last border.
_AROUND, _LAST = 3, 1
WIDE = 400
"""Characters of a line that no terminal shows: in a file, or for another program."""


class _PlainConsole(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command: rich would end the process, with an exit code of 1."""
        raise BrokenPipeError


def plain_console(**options: Any) -> Console:
    """Return a console that prints text as it is: a name may be ``[v1] x`` or ``:fire:``."""
    return _PlainConsole(**{"markup": False, "emoji": False, "highlight": False, **options})


def stop_printing() -> None:
    """Print nothing more: the reader has closed the pipe, and Python would complain at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def last_output() -> Iterator[None]:
    """Print in the block what is done by then: where no one reads it, nothing has failed.

    A command that still has something to do goes on with it.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        stop_printing()


def print_line(text: str) -> None:
    """Print a line without markup or wrapping."""
    plain_console(soft_wrap=True).print(text)


@dataclass(frozen=True)
class Column:
    """A column of a table that fits its terminal.

    least: cells below which it is not folded; None: its lines are never broken. rank: those with
    the highest are left out first where the table is too wide; 0 always stays.
    """

    heading: str
    rank: int = 0
    least: int | None = None
    justify: Literal["left", "right"] = "left"

    def width(self, cells: Sequence[str | Text]) -> int:
        """Return the cells that it takes at least. cells: its contents."""
        longest = max(cell_len(str(text)) for text in (self.heading, *cells))
        return longest if self.least is None else min(longest, self.least)


def fitted_table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str | Text]],
    width: int,
    title: str | None = None,
) -> Table:
    """Return a table of at most ``width`` cells.

    Where it would be wider, columns are left out by their rank, empty ones first, and a line below
    it names those that are not empty.
    """
    contents = [[row[number] for row in rows] for number in range(len(columns))]
    widths = [column.width(contents[n]) + _AROUND for n, column in enumerate(columns)]
    is_empty = [not any(str(text) for text in cells) for cells in contents]
    by_rank = sorted(range(len(columns)), key=lambda n: (is_empty[n], columns[n].rank))
    shown = set(range(len(columns)))
    while sum(widths[n] for n in shown) + _LAST > width and by_rank:
        number = by_rank.pop()
        if columns[number].rank:
            shown.remove(number)
    missing = [
        column.heading
        for number, column in enumerate(columns)
        if number not in shown and not is_empty[number]
    ]
    caption = f"not shown at {width} columns: {', '.join(missing)}" if missing else None
    table = Table(
        title=None if title is None else Text(title), caption=caption, caption_justify="left"
    )
    for number in sorted(shown):
        column = columns[number]
        is_whole = column.least is None
        table.add_column(column.heading, justify=column.justify, no_wrap=is_whole, overflow="fold")
    for row in rows:
        table.add_row(*(row[number] for number in sorted(shown)))
    return table
