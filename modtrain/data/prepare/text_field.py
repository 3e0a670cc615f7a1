r"""Where a record has its text: under a key, along a path, or in several fields of a template.

Names are looked up in mappings and lists alone; nothing is evaluated, and no attribute is read.
"""

from __future__ import annotations

import re
from typing import Any

from modtrain.common.errors import DataError
from modtrain.data.prepare.flaws import shown_names

_KEYS_SHOWN = 8
# A name in braces; doubled braces stand for themselves.
_PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_MISSING = object()


class NoTextError(Exception):
    """A record without the text; the text says what it has."""


class RepeatedNameError(Exception):
    """A table with two columns of the name where the text is: neither is meant."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class TextField:
    r"""Finds the text of a record.

    column: a key, or a path such as ``messages.0.content``; a key of the whole name comes first.
    template: several such names in braces, such as ``{title}\n{body}``, in place of ``column``.
    Raises ValueError for a template that has no name, or a brace without its other one.
    """

    def __init__(self, column: str, template: str | None = None) -> None:
        self.column, self.template = column, template
        self._parts = [("", column)] if template is None else _parsed(template)
        self.names = [name for _, name in self._parts if name]

    def __str__(self) -> str:
        return repr(self.column if self.template is None else self.template)

    def roots(self, columns: list[str]) -> list[str]:
        """Return which of a table's columns the text comes from.

        Raises KeyError with a name that none of them has, RepeatedNameError for one of two.
        """
        columns_used = []
        for name in self.names:
            root = name if name in columns else name.partition(".")[0]
            if root not in columns:
                raise KeyError(name)
            if columns.count(root) > 1:
                raise RepeatedNameError(root)
            columns_used.append(root)
        return list(dict.fromkeys(columns_used))

    def of(self, record: Any) -> Any:
        """Return the text of ``record``; without a template whatever stands in its place.

        Raises NoTextError where a field is missing, or one of a template is no text or number.
        """
        if not isinstance(record, dict):
            raise NoTextError(f"the line is no JSON object, but a {type(record).__name__}")
        values = []
        for literal, name in self._parts:
            values.append(literal)
            if not name:
                continue
            value = _found(record, name)
            if value is None or value is _MISSING:
                raise NoTextError(f"no text in {name!r}{_columns_of(record)}")
            if self.template is None:
                return value
            if isinstance(value, bytes):
                value = value.decode("utf-8", "surrogateescape")
            if not isinstance(value, str | int | float):
                raise NoTextError(f"{name!r} is no text, but a {type(value).__name__}")
            values.append(str(value))
        return "".join(values)


def _parsed(template: str) -> list[tuple[str, str]]:
    r"""Return the literal texts of a template, each with the name that follows it."""
    text = template.replace("\\n", "\n").replace("\\t", "\t")
    parts, literal, at = [], "", 0
    for match in _PART.finditer(text):
        literal += text[at : match.start()]
        at = match.end()
        name = match[1]
        if name:
            parts.append((literal, name))
            literal = ""
        elif match[0] in ("{{", "}}"):
            literal += match[0][0]
        else:
            raise ValueError(f"{match[0]} is no name in braces; for a brace itself write it twice")
    if not parts:
        raise ValueError("it names no field; write one in braces, such as {title}")
    return [*parts, (literal + text[at:], "")]


def _found(record: Any, name: str) -> Any:
    if isinstance(record, dict) and name in record:
        return record[name]
    value = record
    for step in name.split("."):
        if isinstance(value, dict):
            value = value.get(step, _MISSING)
        elif isinstance(value, list | tuple) and step.isdecimal() and len(step) < 10:
            value = value[int(step)] if int(step) < len(value) else _MISSING
        else:
            return _MISSING
    return value


def _columns_of(record: dict[Any, Any]) -> str:
    """Return the keys of a record, and the one that holds its longest text."""
    texts = [str(name) for name, value in record.items() if isinstance(value, str)]
    shown = shown_names(map(str, record), _KEYS_SHOWN) or "none"
    longest = max(texts, key=lambda name: len(record[name]), default=None)
    remedy = "" if longest is None else f". Write text_column={shown_names([longest])}"
    return f"; its keys: {shown}{remedy}"


def columns_of(path: str, names: list[str], field: TextField, has: str = "has") -> list[str]:
    """Return the columns of a table that the text comes from.

    has: what the file does to have its columns, for a message.
    Raises DataError for one that is missing, or that stands there twice.
    """
    try:
        return field.roots(names)
    except RepeatedNameError as error:
        raise DataError(
            f"{path}: {has} the column {error.name!r} twice. Give one of them another name, or set"
            " text_column to another one."
        ) from None
    except KeyError as error:
        raise DataError(
            f"{path}: {has} no column {error.args[0]!r}, only {shown_names(names)}. "
            "Set text_column to the one that holds the text."
        ) from None
