"""Boxes, arrows and text as SVG, once in light and once in dark colours.

Drawings are at most 540 units wide, so that their text still reads on a phone.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

Point = tuple[float, float]

# What each colour name is on a light and on a dark page.
COLOURS = {
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9da7b3"),
    "line": ("#8c959f", "#6e7681"),
    "fill": ("#f6f8fa", "#1f242c"),
    "blue": ("#0550ae", "#79c0ff"),
    "blue_fill": ("#ddf4ff", "#12273f"),
    "orange": ("#953800", "#f0a868"),
    "orange_fill": ("#fff1e5", "#3a2410"),
    "green": ("#116329", "#56d364"),
    "green_fill": ("#dafbe1", "#12331c"),
}
KINDS = {
    "plain": ("fill", "line", "ink"),
    "blue": ("blue_fill", "blue", "blue"),
    "orange": ("orange_fill", "orange", "orange"),
    "green": ("green_fill", "green", "green"),
}
_LINE_HEIGHT = 1.25


@dataclass
class Drawing:
    """An SVG picture of ``width`` by ``height`` units. alt: what it shows, in a sentence."""

    width: float
    height: float
    alt: str
    parts: list[str] = field(default_factory=list)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        title: str,
        about: str = "",
        kind: str = "plain",
        wrap: int = 0,
    ) -> None:
        """Draw a box with a title and, under it, smaller text; wrap: characters a line of it."""
        fill, line, ink = KINDS[kind]
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"'
            f' fill="{{{fill}}}" stroke="{{{line}}}" stroke-width="1.2"/>'
        )
        lines = textwrap.wrap(about, wrap or 200) if about else []
        block = 15 + len(lines) * 12.5 * _LINE_HEIGHT
        top = y + (height - block) / 2 + 12.5
        if title:
            self.text(x + width / 2, top, title, colour=ink, size=15, bold=True)
        for number, text in enumerate(lines):
            at = top + (number + 1) * 12.5 * _LINE_HEIGHT + 1
            self.text(x + width / 2, at, text, colour="muted", size=12.5)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        colour: str = "ink",
        size: float = 13.5,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        """Write one line of text; y is its base line."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}"{weight}'
            f' fill="{{{colour}}}">{_braced(escape(text))}</text>'
        )

    def arrow(
        self,
        *points: Point,
        label: str = "",
        colour: str = "line",
        dashed: bool = False,
        at: Point | None = None,
        anchor: str = "start",
    ) -> None:
        """Draw a line through ``points`` that ends in an arrow; label: at its middle, or ``at``."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{{{colour}}}" stroke-width="1.6"'
            f'{dash} marker-end="url(#head_{colour})"/>'
        )
        if label:
            (x0, y0), (x1, y1) = points[0], points[-1]
            x, y = at or ((x0 + x1) / 2 + 8, (y0 + y1) / 2 + 4)
            self.text(x, y, label, colour="muted", size=12.5, anchor=anchor)

    def cell(self, x: float, y: float, size: float, colour: str, opacity: float = 1.0) -> None:
        """Draw a small filled square."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" rx="2"'
            f' fill="{{{colour}}}" fill-opacity="{opacity:g}"/>'
        )

    def save(self, folder: Path, name: str) -> None:
        """Write ``name-light.svg`` and ``name-dark.svg``."""
        for theme, mode in enumerate(("light", "dark")):
            colours = {colour: pair[theme] for colour, pair in COLOURS.items()}
            body = "\n".join([self._heads(), *self.parts]).format(**colours)
            (folder / f"{name}-{mode}.svg").write_text(
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g}'
                f' {self.height:g}" width="{self.width:g}" height="{self.height:g}" role="img"'
                f' font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif">\n'
                f"<title>{escape(self.alt)}</title>\n{body}\n</svg>\n"
            )

    def _heads(self) -> str:
        """One arrow head for each colour that a line may have."""
        heads = [
            f'<marker id="head_{colour}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8"'
            f' markerHeight="8" orient="auto-start-reverse"><path d="M0 1 L9 5 L0 9 z"'
            f' fill="{{{colour}}}"/></marker>'
            for colour in COLOURS
        ]
        return f"<defs>{''.join(heads)}</defs>"


def _braced(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def flow(
    drawing: Drawing,
    steps: Sequence[tuple[str, str, str]],
    x: float,
    width: float,
    top: float,
    height: float = 58,
    gap: float = 26,
    wrap: int = 60,
) -> list[float]:
    """Draw boxes (title, about, kind) below one another with arrows; return each one's top."""
    tops = [top + number * (height + gap) for number in range(len(steps))]
    for y, (title, about, kind) in zip(tops, steps, strict=True):
        drawing.box(x, y, width, height, title, about, kind, wrap)
    for y in tops[:-1]:
        drawing.arrow((x + width / 2, y + height), (x + width / 2, y + height + gap - 1))
    return tops
