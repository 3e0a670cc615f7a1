"""The configuration reference, written from the dataclasses while the site is built.

A page says where it wants generated text: ``<!-- keys: eval -->`` becomes every key of
``modtrain eval``, ``<!-- groups -->`` the choices of each group of ``conf/``, and ``<!-- help -->``
what ``modtrain --help`` prints. A key without a meaning in its class's docstring fails the build.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modtrain.cli.compose import SCHEMAS, compose, conf_dir
from modtrain.cli.main import main

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_PLACE = re.compile(r"<!-- (keys|groups|help)(?:: ([a-z_-]+))? -->")


@dataclass(frozen=True)
class Key:
    """One key as a user writes it: its type, its default once composed, and what it means."""

    name: str
    annotation: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """The keys of one dataclass. prefix: what stands before them, empty at the top."""

    schema: type
    prefix: str
    about: str
    keys: list[Key]


def meanings(schema: type) -> dict[str, str]:
    """Return what the docstrings of ``schema`` and its bases say of each field, as Markdown.

    A field's text begins at the start of a line or sentence with its name, or several names with
    commas between, and a colon; it ends where the next field or a blank line begins.
    """
    meanings: dict[str, str] = {}
    for cls in schema.__mro__[:-1]:
        # Bases last: what a class says of an inherited field holds for it.
        names = {field.name for field in fields(cls)}
        for text in _paragraphs(cls):
            meanings = {**_split(text, names), **meanings}
    return meanings


def about(schema: type) -> str:
    """Return what the docstring of ``schema`` says of the whole, as Markdown."""
    names = {field.name for field in fields(schema)}
    texts = [
        text[: match.start()] if (match := _key(names).search(text)) else text
        for text in _paragraphs(schema)
    ]
    return "\n\n".join(_markdown(text) for text in texts if text.strip())


@functools.cache
def sections(verb: str) -> list[Section]:
    """Return the keys of ``verb``, grouped by dataclass, as the command line takes them.

    Raises:
        ValueError: a key has no meaning in its class's docstring; names the class and the key.
    """
    return list(_walk(SCHEMAS[verb], compose(verb, []), ""))


def _walk(schema: type, value: Any, prefix: str) -> Iterator[Section]:
    texts = meanings(schema)
    keys, parts = [], []
    for field in _own_fields(schema):
        name, at = f"{prefix}{field.name}", getattr(value, field.name)
        if is_dataclass(at):
            parts.append((type(at), at, f"{name}."))
        elif field.name not in texts:
            raise ValueError(f"{schema.__name__}: its docstring says nothing of {field.name!r}")
        else:
            default = _shown(at)
            annotation = str(field.type).replace("Any", "str | list")
            keys.append(Key(name, annotation, default, texts[field.name]))
    yield Section(schema, prefix, about(schema), keys)
    for part in parts:
        yield from _walk(*part)


def _own_fields(schema: type) -> list[Any]:
    """Return the fields of ``schema``; of a verb that extends another verb's, the added ones."""
    taken = [base for base in SCHEMAS.values() if base is not schema and issubclass(schema, base)]
    inherited = {field.name for base in taken for field in fields(base)}
    return [field for field in fields(schema) if field.name not in inherited]


def _paragraphs(cls: type) -> list[str]:
    return re.split(r"\n\s*\n", inspect.cleandoc(cls.__doc__ or ""))


def _key(names: set[str]) -> re.Pattern[str]:
    name = "|".join(sorted(names, key=len, reverse=True))
    return re.compile(rf"(?:^|(?<=[.;] ))((?:{name})(?:, (?:{name}))*): ", re.MULTILINE)


def _split(text: str, names: set[str]) -> dict[str, str]:
    parts = _key(names).split(text)
    meanings = {}
    for heading, meaning in zip(parts[1::2], parts[2::2], strict=True):
        for name in heading.split(", "):
            meanings[name] = _markdown(meaning.rstrip(" ;\n"))
    return meanings


def _markdown(text: str) -> str:
    joined = " ".join(text.split())
    pieces = re.split(r"(``.+?``)", joined)
    return "".join(
        piece[1:-1] if piece.startswith("``") else re.sub(r"([<>*_])", r"\\\1", piece)
        for piece in pieces
    ).replace("\\`", "`")


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


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
            lines += [section.about, ""]
        for key in section.keys:
            anchor = f"{verb}.{key.name}".replace(".", "-")
            lines += [
                f"[`{key.name}`]{{#{anchor}}} · {key.annotation} · default `{key.default}`",
                f": {key.meaning}",
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
