"""Consoles that print names and paths as they are."""

from __future__ import annotations

from typing import Any

from rich.console import Console


class _PlainConsole(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command: rich would end the process, with an exit code of 1."""
        raise BrokenPipeError


def plain_console(**settings: Any) -> Console:
    """Return a console that takes no part of a text for markup or for an emoji's name.

    A run may be called ``[v1] first`` or ``:fire:``. settings: of `rich.console.Console`.
    """
    return _PlainConsole(**{"markup": False, "emoji": False, **settings})
