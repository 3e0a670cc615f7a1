"""The configuration reference, written from the dataclasses while the site is built.

A page says where it wants generated text: ``<!-- keys: eval -->`` becomes every key of
``modtrain eval``, ``<!-- groups -->`` the choices of each group of ``conf/``, and ``<!-- help -->``
what ``modtrain --help`` prints. A key without a meaning in its class's docstring fails the build.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from modtrain.cli.compose import SCHEMAS, conf_dir
from modtrain.cli.key_reference import sections
from modtrain.cli.main import main

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_PLACE = re.compile(r"<!-- (keys|groups|help)(?:: ([a-z_-]+))? -->")


def _markdown(text: str) -> str:
    pieces = re.split(r"(``.+?``)", text)
    return "".join(
        piece[1:-1] if piece.startswith("``") else re.sub(r"([<>*_])", r"\\\1", piece)
        for piece in pieces
    ).replace("\\`", "`")


def keys_markdown(verb: str) -> str:
    """Return the reference of ``verb``: a definition list of keys under a heading each."""
    lines = []
    for section in sections(verb):
        name = section.prefix.rstrip(".")
        if name and (other := _described_at(section.schema, section.prefix, verb)):
            lines += [f"`{name}.…`: as of [{other}](#{other}-{name.replace('.', '-')}).", ""]
            continue
        if name:
            lines += [f"### {verb}: {name}", ""]
        if section.about:
            lines += [_markdown(section.about), ""]
        for key in section.keys:
            anchor = f"{verb}.{key.name}".replace(".", "-")
            lines += [
                f"[`{key.name}`]{{#{anchor}}} · {key.annotation} · default `{key.default}`",
                f": {_markdown(key.meaning)}",
                "",
            ]
    return "\n".join(lines)


def _described_at(schema: type, prefix: str, verb: str) -> str | None:
    """Return the earlier verb whose reference has the same part, if there is one."""
    for other in SCHEMAS:
        if other == verb:
            return None
        if any(s.prefix == prefix and s.schema is schema for s in sections(other)):
            return other
    return None


def groups_markdown() -> str:
    """Return each group of ``conf/`` with its choices and the first line of each one's comment."""
    lines = []
    for folder in sorted(path for path in conf_dir().rglob("*") if path.is_dir()):
        files = sorted(folder.glob("*.yaml"))
        group = folder.relative_to(conf_dir()).as_posix()
        if files:
            lines += [f"### Group {group}", "", f"| `{group}=` | what |", "|---|---|"]
            lines += [f"| `{file.stem}` | {_comment(file)} |" for file in files] + [""]
    return "\n".join(lines)


def _comment(file: Path) -> str:
    head = itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    text = " ".join(line.removeprefix("#").strip() for line in head if "@package" not in line)
    if not text:
        raise ValueError(f"{file}: begins without a comment that says what it is")
    return text.replace("|", "\\|").replace("*", "\\*")


def help_text() -> str:
    """Return what ``modtrain --help`` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main(["--help"])
    return f"```text\n{printed.getvalue()}```"


def fill(text: str) -> str:
    """Return ``text`` with generated Markdown in the place of its marks."""

    def generated(match: re.Match[str]) -> str:
        what, verb = match.groups()
        return {"keys": lambda: keys_markdown(verb), "groups": groups_markdown, "help": help_text}[
            what
        ]()

    return _PLACE.sub(generated, text)


def setup(app: Sphinx) -> dict[str, bool]:
    """Fill the marks of each page when Sphinx reads it."""

    def on_source_read(_: Sphinx, __: str, source: list[str]) -> None:
        source[0] = fill(source[0])

    app.connect("source-read", on_source_read)
    return {"parallel_read_safe": True}
