"""Hydra's overrides as a user writes them, and remedies for wrong ones.

Imports nothing heavy.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from modtrain.common.config_keys import added_keys, all_keys, keys_beside, nearest_keys
from modtrain.common.errors import Problem
from modtrain.common.renamed_keys import renamed_problem

# Texts that Hydra does not convert; it parses 1_2, 1e5 and null as other types.
_PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z][A-Za-z0-9_./-]*|[1-9]\d*", re.I)


def parse(overrides: Sequence[str], sweeps: bool = False) -> tuple[list[Override], list[Problem]]:
    """Return the overrides that Hydra can parse, and the problems of the others.

    sweeps: whether an override may have several values.
    """
    parser = OverridesParser.create()
    parsed: list[Override] = []
    problems: list[Problem] = []
    for text in overrides:
        key, _, value = text.partition("=")
        if not key.strip("+~ "):
            problems.append(Problem(text, "", "has no key", "write key=value or group=name"))
            continue
        try:
            override = parser.parse_override(text)
            is_sweep = override.is_sweep_override()
            if not is_sweep:
                override.value()
        except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
            reason = f"is not understood: {plain(error)}"
            problems.append(Problem(key, value, reason, _form_of(key, value)))
            continue
        old_key = renamed_problem(override.key_or_group.replace("/", "."), value)
        if old_key is not None:
            problems.append(old_key)
        elif is_sweep and not sweeps:
            remedy = "give one value; a list stands in brackets, a text with commas in quotes"
            problems.append(Problem(override.get_key_element(), text, "has several values", remedy))
        else:
            parsed.append(override)
    return parsed, problems


def quoted(text: str) -> str:
    """Quote ``text`` so that Hydra parses it unchanged."""
    return QuotedString(text, Quote.double).with_quotes()


def search_path(config_dir: str | None) -> list[str]:
    """Return the override by which Hydra also finds YAML in ``config_dir``; none without one."""
    if config_dir is None:
        return []
    return [f"hydra.searchpath=[{quoted(f'file://{Path(config_dir).resolve()}')}]"]


def spelled(key: str, value: str) -> str:
    """Write ``key=value`` so that both the shell and Hydra take it as it is."""
    return f"{key}={value}" if _PLAIN.fullmatch(value) else in_quotes(key, value)


def in_quotes(key: str, value: str) -> str:
    """Return the override that gives ``value`` as text, quoted for a shell."""
    return shlex.quote(f"{key}={quoted(value)}")


def misread(override: Override) -> Problem | None:
    """Return the problem of a text that Hydra parses as a number or boolean and changes."""
    value, text = override.value(), str(override.input_line).partition("=")[2].strip()
    if not isinstance(value, int | float) or str(value) == text:
        return None
    remedy = f"write {in_quotes(override.get_key_element(), text)}"
    return Problem(override.key_or_group, text, f"would be read as {value}", remedy)


def _form_of(key: str, value: str) -> str:
    """Return the remedy for an override that Hydra cannot parse."""
    if re.fullmatch(r"\+{0,2}[A-Za-z_][\w./]*", key) and value.strip()[:1] not in ("", "[", "{"):
        return f"write a text as {in_quotes(key, value)}"
    return """write a list as 'key=[1, 2]', a text as 'key="a value with = or brackets"'"""


def explain(
    override: Override, base: DictConfig, error: Exception, extra_keys: Sequence[str]
) -> Problem:
    """Return the problem of an override that does not compose.

    base: the configuration without it. extra_keys: keys outside ``base`` to suggest.
    """
    key = override.get_key_element().lstrip("+~")
    value = str(override.input_line).partition("=")[2]
    known_keys = [*all_keys(base), *extra_keys]
    parent = key.rpartition(".")[0]
    is_new = key not in known_keys and parent in known_keys and not override.is_delete()
    is_entry = is_new and OmegaConf.get_type(OmegaConf.select(base, parent)) is dict
    if key not in known_keys and not is_entry:
        return not_a_key(override, base, extra_keys)
    if override.is_delete():
        reason, remedy = "cannot be removed", f"leave ~{key} out, or set {key} to another value"
        return Problem(key, value, reason, remedy)
    reason = plain(error).removeprefix(f"Error merging override {override.input_line}").strip()
    current = OmegaConf.select(base, key)
    if re.match(r"Key \S+ \(\w+\) is incompatible with \(str\)", reason):
        remedy = "begin the name with a letter, as in run_1: Hydra does not read this one as text"
    elif reason.endswith("is not in struct"):
        remedy = f"add a new entry with a plus: +{override.input_line}"
    elif current is not None:
        remedy = f"give a value such as {current}"
    else:
        remedy = "give a value of that type"
    return Problem(key, value, f"does not fit: {reason}", remedy)


def not_a_key(override: Override, config: DictConfig, extra_keys: Sequence[str] = ()) -> Problem:
    """Return the problem of an override of what is no key, with the one that may be meant.

    config: with the keys there are. extra_keys: keys outside ``config`` to suggest.
    """
    key = override.get_key_element().lstrip("+~")
    wrong = added_keys(config)
    known = [k for k in all_keys(config) if not f"{k}.".startswith(tuple(f"{w}." for w in wrong))]
    near = nearest_keys(key, [*known, *extra_keys])
    section, names = keys_beside(key, known)
    remedy = f"keys of {section}" if section else "top-level keys"
    remedy = f"did you mean {' or '.join(near)}?" if near else f"{remedy}: {', '.join(names)}"
    value = str(override.input_line).partition("=")[2]
    return Problem(key, value, "is not a key of this configuration", remedy)


def plain(error: BaseException) -> str:
    """Return the innermost message, on one line, without OmegaConf's trailer."""
    while error.__cause__ is not None and str(error.__cause__) not in ("", "None"):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    # The first line says where, the second one what.
    return " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
