"""Hydra's overrides as a user writes them, and remedies for wrong ones.

Imports nothing heavy.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from modtrain.common.config_keys import added_keys, all_keys, keys_beside, nearest_keys
from modtrain.common.errors import Problem
from modtrain.common.other_tools import key_here, sentence_for, value_here
from modtrain.common.renamed_keys import renamed_problem
from modtrain.common.spelling import in_quotes, misfit, quoted, spelling, syntax_fault

SOURCES = "data.sources"
"""The section of a mixture's sources, whose keys a user names."""
_NAMED_BY_USERS = (
    *(SOURCES, "arms", "columns", "families", "tokens_per_parameter_of", "lr_rule.factors"),
)
SEVERAL_VALUES = "has several values"
"""The reason of a problem of an override that would be a sweep."""
NOT_UNDERSTOOD = "is not understood: "
"""What the reason of a problem of an override that Hydra cannot parse begins with."""


def parse(overrides: Sequence[str], sweeps: bool = False) -> tuple[list[Override], list[Problem]]:
    """Return the overrides that Hydra can parse, and the problems of the others.

    sweeps: whether an override may have several values.
    """
    parser = OverridesParser.create()
    parsed: list[Override] = []
    problems: list[Problem] = []
    for text in overrides:
        key, sign, value = text.partition("=")
        if not key.strip("+~ "):
            problems.append(Problem(text, "", "has no key", "write key=value or group=name"))
            continue
        if not sign and not key.startswith("~"):
            problems.append(Problem(text, "", "has no value", "write key=value or group=name"))
            continue
        try:
            override = parser.parse_override(text)
            is_sweep = override.is_sweep_override()
            if not is_sweep:
                override.value()
        except (HydraException, OmegaConfBaseException, ValueError, TypeError):
            problems.append(Problem(key, value, _syntax(key, value), _form_of(key, value)))
            continue
        old_key = renamed_problem(override.key_or_group.replace("/", "."), value)
        if old_key is not None:
            problems.append(old_key)
        elif is_sweep and not sweeps:
            remedy = "give one value; a list stands in brackets, a text with commas in quotes"
            problems.append(Problem(override.get_key_element(), value, SEVERAL_VALUES, remedy))
        else:
            parsed.append(override)
    return parsed, problems


def search_path(config_dir: str | None) -> list[str]:
    """Return the override by which Hydra also finds YAML in ``config_dir``; none without one."""
    if config_dir is None:
        return []
    return [f"hydra.searchpath=[{quoted(f'file://{Path(config_dir).resolve()}')}]"]


def opened(line: str) -> str:
    """Return an override's text, which adds to a dictionary whose keys a user names."""
    key = f"{line.partition('=')[0]}."
    is_entry = key.startswith(tuple(f"{name}." for name in _NAMED_BY_USERS))
    return f"++{line}" if is_entry else line


def misread(override: Override) -> Problem | None:
    """Return the problem of a text that Hydra parses as a number or boolean and changes.

    The override's key takes a text, or a list of texts.
    """
    value, text = override.value(), str(override.input_line).partition("=")[2].strip()
    key = override.get_key_element()
    if isinstance(value, list):
        items = [item.strip() for item in text.strip("[] ").split(",")]
        changed = [v for v in value if isinstance(v, int | float) and str(v) not in items]
        if not changed:
            return None
        value = ", ".join(map(str, changed))
        remedy = f"write {shlex.quote(f'{key}=[' + ', '.join(map(quoted, items)) + ']')}"
    elif isinstance(value, int | float) and str(value) != text:
        here = value_here(key, text)
        remedy = f"write {in_quotes(key, text)}" if here == text else f"did you mean {here}?"
    else:
        return None
    return Problem(override.key_or_group, text, f"would be read as {value}", remedy)


def _syntax(key: str, value: str) -> str:
    """Return why Hydra cannot parse ``key=value``, without the words of its grammar."""
    if not re.fullmatch(r"\+{0,2}~?[\w./@-]+", key.strip()):
        return f"{NOT_UNDERSTOOD}the key has characters that no key has"
    return f"{NOT_UNDERSTOOD}{syntax_fault(value)}"


def with_spelling(problem: Problem, config: DictConfig) -> Problem:
    """Return the problem of an override that is not parsed with the form that ``config`` takes."""
    if problem.reason != SEVERAL_VALUES and not problem.reason.startswith(NOT_UNDERSTOOD):
        return problem
    key = problem.key.lstrip("+")
    plus = problem.key[: len(problem.key) - len(key)]
    word = spelling(config, key, str(problem.value), plus)
    return problem if word is None else replace(problem, remedy=f"write {word}")


def _form_of(key: str, value: str) -> str:
    """Return the remedy for an override that Hydra cannot parse."""
    if re.fullmatch(r"\+{0,2}[A-Za-z_][\w./]*", key) and value.strip()[:1] not in ("", "[", "{"):
        return f"write a text as {in_quotes(key, value)}"
    return """write a list as 'key=[1, 2]', a text as 'key="a value with = or brackets"'"""


def explain(
    override: Override,
    base: DictConfig,
    error: Exception,
    extra_keys: Sequence[str],
    groups: Sequence[str],
) -> Problem:
    """Return the problem of an override that does not compose.

    base: the configuration without it. extra_keys: keys outside ``base`` to suggest. groups: those
    that have choices.
    """
    key = override.get_key_element().lstrip("+~")
    value = str(override.input_line).partition("=")[2]
    known_keys = [*all_keys(base), *extra_keys]
    parent = key.rpartition(".")[0]
    is_new = key not in known_keys and parent in known_keys and not override.is_delete()
    is_entry = is_new and OmegaConf.get_type(OmegaConf.select(base, parent)) is dict
    of_source = _source_problem(override, key, value) if key.startswith(SOURCES) else None
    if of_source is not None or (key not in known_keys and not is_entry):
        return of_source or not_a_key(override, base, extra_keys, groups)
    if override.is_delete():
        reason, remedy = "cannot be removed", f"leave ~{key} out, or set {key} to another value"
        return Problem(key, value, reason, remedy)
    reason = plain(error).removeprefix(f"Error merging override {override.input_line}").strip()
    if re.match(r"Key \S+ \(\w+\) is incompatible with \(str\)", reason):
        remedy = "begin the name with a letter, as in run_1: Hydra does not read this one as text"
        return Problem(key, value, "has a name that is no text", remedy)
    if reason.endswith("is not in struct"):
        remedy = f"add a new entry with a plus: {shlex.quote(f'+{override.input_line}')}"
        return Problem(key, value, "is a new entry", remedy)
    if "${" in value:
        remedy = "name a key that is there, or put the text in quotes and a \\ before $"
        return Problem(key, value, "refers to what is not there", remedy)
    wrong = misfit(base, key, override.value(), value)
    why, remedy = wrong or (f"does not fit: {reason}", "give a value of that type")
    return Problem(key, value, why, remedy)


def _source_problem(override: Override, key: str, value: str) -> Problem | None:
    """Return the problem of a source of a mixture that is not given in a dictionary of all."""
    given, parts = override.value(), key.removeprefix(SOURCES).strip(".").split(".")
    if parts == [""]:
        paths = given if isinstance(given, dict) else {}
    elif len(parts) == 1:
        paths = {parts[0]: given.get("path") if isinstance(given, dict) else given}
    else:
        paths = {parts[0]: given} if parts[1:] == ["path"] else {}
    if not paths or not all(isinstance(path, str) for path in paths.values()):
        return None
    entries = ", ".join(f"{name}: {{path: {quoted(str(path))}}}" for name, path in paths.items())
    remedy = f"write {shlex.quote(f'{SOURCES}={{{entries}}}')}, with all sources in it"
    return Problem(key, value, "is not how a source is given", remedy)


def not_a_key(
    override: Override,
    config: DictConfig,
    extra_keys: Sequence[str] = (),
    groups: Sequence[str] = (),
) -> Problem:
    """Return the problem of an override of what is no key, with the one that may be meant.

    config: with the keys there are. extra_keys: keys outside ``config`` to suggest. groups: those
    that have choices.
    """
    key = override.get_key_element().lstrip("+~")
    value = str(override.input_line).partition("=")[2]
    if key.startswith(SOURCES) and (of_source := _source_problem(override, key, value)):
        return of_source
    return unknown_key(key, value, config, extra_keys, groups)


def unknown_key(
    key: str,
    value: str,
    config: DictConfig,
    extra_keys: Sequence[str] = (),
    groups: Sequence[str] = (),
) -> Problem:
    """Return the problem of ``key=value``, which is no key, with the one that may be meant.

    config, extra_keys, groups: as in `not_a_key`.
    """
    wrong = added_keys(config)
    known = [k for k in all_keys(config) if not f"{k}.".startswith(tuple(f"{w}." for w in wrong))]
    reason = "is not a key of this configuration"
    if sentence := sentence_for(key, value, known):
        return Problem(key, value, reason, sentence)
    if target := key_here(key, known, groups):
        here = value_here(target, value)
        remedy = f"write {spelling(config, target, here) or f'{target}={here}'}"
        return Problem(key, value, reason, remedy)
    near = nearest_keys(key, [*known, *extra_keys])
    section, names = keys_beside(key, known)
    remedy = f"keys of {section}" if section else "top-level keys"
    remedy = f"did you mean {' or '.join(near)}?" if near else f"{remedy}: {', '.join(names)}"
    return Problem(key, value, reason, remedy)


def plain(error: BaseException) -> str:
    """Return the innermost message, on one line, without OmegaConf's trailer."""
    while error.__cause__ is not None and str(error.__cause__) not in ("", "None"):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    # The first line says where, the second one what.
    return " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
