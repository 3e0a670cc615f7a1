"""The keys of each verb with their types, defaults and meanings, read from the dataclasses."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from modtrain.cli.compose import SCHEMAS, compose


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
    """Return what the docstrings of ``schema`` and its bases say of each field, with its markup.

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
    """Return what the docstring of ``schema`` says of the whole, with its markup."""
    names = {field.name for field in fields(schema)}
    texts = [
        text[: match.start()] if (match := _key(names).search(text)) else text
        for text in _paragraphs(schema)
    ]
    return "\n\n".join(_joined(text) for text in texts if text.strip())


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
            meanings[name] = _joined(meaning.rstrip(" ;\n"))
    return meanings


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _joined(text: str) -> str:
    return " ".join(text.split())
