"""How a value has to be written, so that Hydra reads what was meant and the key takes it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import is_dataclass
from typing import Any, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# Texts that Hydra does not convert; it parses 1_2, 1e5 and null as other types.
_PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z][A-Za-z0-9_./-]*|[1-9]\d*", re.I)
_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*([kmbgt]?)", re.I)
_SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_KINDS = {
    int: "is not a whole number",
    float: "is not a number",
    bool: "is not true or false",
    str: "is not one text",
}
_CHILDREN_SHOWN = 3
_OPENING = {")": "(", "]": "[", "}": "{"}


def quoted(text: str) -> str:
    """Quote ``text`` so that Hydra parses it unchanged."""
    return QuotedString(text, Quote.double).with_quotes()


def spelled(key: str, value: str) -> str:
    """Write ``key=value`` so that both the shell and Hydra take it as it is."""
    return f"{key}={value}" if _PLAIN.fullmatch(value) else in_quotes(key, value)


def in_quotes(key: str, value: str) -> str:
    """Return the override that gives ``value`` as text, quoted for a shell."""
    return shlex.quote(f"{key}={quoted(value)}")


def list_in_quotes(key: str, item: str) -> str:
    """Return the override that gives a list of one text, quoted for a shell."""
    return shlex.quote(f"{key}=[{quoted(item)}]")


def spelling(config: DictConfig, key: str, text: str, plus: str = "") -> str | None:
    """Return ``key=value``, quoted for a shell, as ``key`` of ``config`` takes what ``text`` means.

    plus: what stands before the key. None where no spelling does: each is tried. A text without a
    value that it may stand for has none, and so has a key that is not in ``config``.
    """
    node = node_of(config, key)
    if node is None:
        return None
    for value in dict.fromkeys(_candidates(node, text.strip())):
        if _fits(config, key, value):
            return shlex.quote(f"{plus}{key}={value}")
    return None


def misfit(config: DictConfig, key: str, value: Any, text: str) -> tuple[str, str] | None:
    """Return why ``key`` of ``config`` does not take ``value``, and what to write instead.

    text: the value as written. None where the reason is another one than its type.
    """
    node = node_of(config, key)
    if node is None:
        return None
    if value is None:
        return "cannot be null", f"leave it out{_default(node, '; the default is ')}"
    if isinstance(node, DictConfig) and is_dataclass(node._metadata.object_type):
        return _section_misfit(node, key, value, text)
    if isinstance(node, ListConfig) and isinstance(value, list):
        return _item_misfit(config, node, key, value, text)
    if isinstance(node, ListConfig | DictConfig):
        kind = list if isinstance(node, ListConfig) else dict
        reason = "is not a list" if kind is list else "is not a dictionary"
    else:
        kind = node._metadata.ref_type
        reason = _KINDS.get(kind, "")
    if not reason or type(value) is kind:
        return None
    word = spelling(config, key, text)
    return reason, f"write {word}" if word else f"give one{_default(node, ', such as ')}"


def _section_misfit(
    section: DictConfig, key: str, value: object, text: str
) -> tuple[str, str] | None:
    if not isinstance(value, dict):
        return "is a section of keys, not a value", _for_section(section, key, text)
    wrong = next((str(name) for name in value if name not in section), None)
    remedy = f"write {key}.KEY=VALUE; keys of {key}: {', '.join(map(str, section))}"
    return None if wrong is None else (f"has no key {wrong}", remedy)


def _item_misfit(
    config: DictConfig, node: ListConfig, key: str, items: list[Any], text: str
) -> tuple[str, str] | None:
    """Return which of ``items`` the list ``node`` does not take, and what to write instead."""
    kind = node._metadata.element_type
    for item in items:
        try:
            ListConfig([], element_type=kind).append(item)
        except OmegaConfBaseException:
            word = spelling(config, key, text)
            shown = "null" if item is None else item
            reason = f"has {shown}, which {_KINDS.get(kind, 'is of another type')}"
            return reason, f"write {word}" if word else f"give a list without {shown}"
    return None


def bracket_fault(text: str) -> str:
    """Return which bracket or quote of ``text`` has no partner; empty where each has one."""
    opened: list[str] = []
    quote = ""
    for character in text:
        if character in "'\"" and quote in ("", character):
            quote = "" if quote else character
        elif not quote and character in "([{":
            opened.append(character)
        elif (
            not quote
            and character in _OPENING
            and (not opened or opened.pop() != _OPENING[character])
        ):
            return f"{character} closes nothing"
    return f"{quote or opened[-1]} is not closed" if quote or opened else ""


def syntax_fault(text: str) -> str:
    """Return why Hydra cannot parse ``text``, without the words of its grammar."""
    return bracket_fault(text) or "it has characters that Hydra gives a meaning"


def is_unclosed(text: str) -> bool:
    """Whether a bracket or quote of ``text`` is still open at its end."""
    return bracket_fault(text).endswith("is not closed")


def list_items(text: str) -> list[str]:
    """Return the items of a list as they are written, also where a bracket around it is missing."""
    items, item = [], ""
    for part in _without_brackets(text.strip()).split(","):
        item = f"{item},{part}" if item else part
        if not is_unclosed(item):
            items.append(item.strip())
            item = ""
    return [one for one in [*items, item.strip()] if one]


def _without_brackets(text: str) -> str:
    is_opened, is_closed = text[:1] in ("[", "("), text[-1:] in ("]", ")")
    # Where the first bracket belongs to another one than the last, both are of the items.
    if is_opened and is_closed and not bracket_fault(text[1:-1]):
        return text[1:-1].strip()
    if is_opened and is_unclosed(text):
        return text[1:].strip()
    is_surplus = is_closed and bracket_fault(text).endswith("closes nothing")
    return text[:-1].strip() if is_surplus else text


def kind_of(config: DictConfig, key: str) -> object:
    """Return the type that the values of ``key`` have; None where there is no such key."""
    node = node_of(config, key)
    return None if node is None else node._metadata.ref_type


def node_of(config: DictConfig, key: str) -> Any:
    """Return the node of ``key``; None where there is no such key."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, DictConfig) or node._is_none() or part not in node:
            return None
        node = node._get_node(part)
    return node


def _candidates(node: Any, text: str) -> Iterator[str]:
    kind = node._metadata.ref_type
    if isinstance(node, ListConfig):
        yield f"[{_without_brackets(text)}]"
        yield f"[{', '.join(quoted(_without_quotes(item)) for item in list_items(text))}]"
        return
    if isinstance(node, DictConfig):
        if entries := _entries(node, text):
            yield entries
    elif kind is bool:
        yield {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(text.lower(), text)
    elif kind in (int, float):
        yield from _numbers(text, kind is int)
    else:
        if kind is Any and "," in text:
            yield f"[{_without_brackets(text)}]"
        yield text if _PLAIN.fullmatch(text) else quoted(text)


def _entries(node: DictConfig, text: str) -> str | None:
    """Write ``{a:[x=1], b: y}`` so that Hydra parses it; None for a section, or other texts."""
    if is_dataclass(node._metadata.object_type) or (text[:1], text[-1:]) != ("{", "}"):
        return None
    has_lists = get_origin(node._metadata.element_type) is list
    entries = []
    for item in list_items(text[1:-1]):
        name, sign, value = item.partition(":")
        name, value = _without_quotes(name.strip()), value.strip()
        if not sign or not _NAME.fullmatch(name) or value[:1] == "{":
            return None
        if has_lists or value[:1] == "[":
            items = (quoted(_without_quotes(one)) for one in list_items(value))
            entries.append(f"{name}: [{', '.join(items)}]")
        else:
            is_plain = _PLAIN.fullmatch(value) or _NUMBER.fullmatch(value)
            entries.append(f"{name}: {value if is_plain else quoted(_without_quotes(value))}")
    return f"{{{', '.join(entries)}}}"


def _without_quotes(text: str) -> str:
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if is_quoted else text


def _numbers(text: str, whole: bool) -> Iterator[str]:
    """Write 1M, 1,000,000, 10 %, 1/8 and 1e6 as a number."""
    plain = text.strip("'\"").replace("_", "")
    if re.fullmatch(r"\d{1,3}(,\d{3})+", plain):
        plain = plain.replace(",", "")
    number: float | None = None
    if share := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", plain):
        number = float(share[1]) / 100
    elif ratio := re.fullmatch(r"(\d{1,9})/([1-9]\d{0,8})", plain):
        number = int(ratio[1]) / int(ratio[2])
    elif match := _NUMBER.fullmatch(plain):
        with suppress(OverflowError):
            number = float(match[1]) * _SUFFIXES[match[2].lower()]
    if number is None or abs(number) > 1e30:
        return
    if not whole and (match := _NUMBER.fullmatch(plain)) and not match[2]:
        yield plain
    if number == int(number):
        yield str(int(number)) if whole or abs(number) < 1e5 else _scientific(number)
    elif not whole:
        yield f"{number:g}"


def _scientific(number: float) -> str:
    mantissa, _, exponent = f"{number:.15e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _fits(config: DictConfig, key: str, value: str) -> bool:
    trial = config.copy()
    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
        if override.is_sweep_override():
            return False
        read = override.value()
        plain = (
            [str(v) if isinstance(v, QuotedString) else v for v in read]
            if isinstance(read, list)
            else read
        )
        OmegaConf.update(trial, key, plain, merge=False)
    except (HydraException, OmegaConfBaseException, ValueError, TypeError):
        return False
    return True


def _for_section(section: DictConfig, key: str, text: str) -> str:
    """Return the keys of a section that take ``text``: those for numbers where it is one."""
    is_number = any(True for _ in _numbers(text, whole=False))
    kinds = (int, float) if is_number else (str,)
    words = [
        shlex.quote(f"{key}.{shlex.split(word)[0]}")
        for name in map(str, section)
        if kind_of(section, name) in kinds and (word := spelling(section, name, text))
    ][:_CHILDREN_SHOWN]
    return f"write {' or '.join(words)}" if words else f"its keys: {', '.join(map(str, section))}"


def _default(node: Any, before: str) -> str:
    value = OmegaConf.to_container(node) if isinstance(node, ListConfig) else node._value()
    if value is None or isinstance(node, DictConfig):
        return ""
    return f"{before}{str(value).lower() if isinstance(value, bool) else value}"
