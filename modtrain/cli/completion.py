"""Completion of command lines in a shell, by argcomplete. Loads no torch and no Hydra.

The shell's function calls modtrain with what is typed so far in its environment. What is offered
here are words alone: how they are quoted, and where a shell breaks them, argcomplete knows.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from argcomplete.completers import FilesCompleter
from argcomplete.finders import CompletionFinder
from argcomplete.lexers import split_line
from argcomplete.shell_integration import shellcode

from modtrain.cli.arguments import make_parser
from modtrain.cli.groups import groups_of
from modtrain.cli.local_ranks import VERBS as LAUNCHED
from modtrain.cli.schemas import SUBMITTED, VERBS, schema_of
from modtrain.common.errors import ConfigError, Problem
from modtrain.training.run_listing import run_names

SHELLS = ("bash", "zsh", "fish")
# The first word of these is a verb too.
_WITH_VERB = {"config": VERBS, "help": VERBS, "submit": SUBMITTED}
_TRAINING = ("train", "plan", "compare", "isoflop", "search", "search-patterns")
# Keys whose values are names of runs, and those whose values are files or folders.
_RUN_KEYS = ("run", "runs", "name", "from", "branch.run", "init.run")
_PATH_KEYS = (
    *(
        "path",
        "data_path",
        "output",
        "file",
        "points",
        "source",
        "sources",
        "runs_dir",
        "cache_dir",
    ),
    *("--config-dir",),
)


def shell_code(words: Sequence[str]) -> str:
    """Return what a shell has to evaluate so that it completes modtrain's command lines.

    words: the shell's name alone.

    Raises:
        ConfigError: it is another one.
    """
    if len(words) != 1 or words[0] not in SHELLS:
        remedy = f"write modtrain completion {'|'.join(SHELLS)}"
        raise ConfigError([Problem("completion", " ".join(words), "is no shell", remedy)])
    return shellcode(["modtrain"], shell=words[0])


def complete(verbs: Collection[str]) -> None:
    """Answer the shell's question in the environment, and end the process."""
    finder = _Finder()
    finder.verbs = verbs
    finder(argparse.ArgumentParser(add_help=False))


class _Finder(CompletionFinder):
    """Offers what modtrain takes, whatever an argparse parser would."""

    # Not of the constructor, which argcomplete calls again.
    verbs: Collection[str] = ()

    def collect_completions(
        self, active_parsers: Any, parsed_args: Any, cword_prefix: str
    ) -> list[str]:
        """Return the words that may stand in place of the prefix."""
        del active_parsers, parsed_args
        line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
        words = split_line(line, point)[3][int(os.environ["_ARGCOMPLETE"]) :]
        return candidates(words, cword_prefix, self.verbs)


def candidates(words: Sequence[str], current: str, verbs: Collection[str]) -> list[str]:
    """Return what ``current`` may become. words: those before it, without the program's name."""
    config_dir = _value_of("--config-dir", words)
    if words and words[-1] == "--config-dir":
        return _paths(current)
    before = ["", *words]
    plain = [w for b, w in zip(before, words, strict=False) if w[:1] != "-" and b != "--config-dir"]
    if current.startswith("-"):
        offered = list(make_parser({})._option_string_actions)
    elif not plain:
        offered = [*verbs, "help"]
    elif plain[0] == "completion":
        offered = list(SHELLS) if len(plain) == 1 else []
    elif plain[0] in _WITH_VERB and len(plain) == 1:
        offered = list(_WITH_VERB[plain[0]])
    else:
        of_job = plain[0] == "submit"
        verb = plain[1] if plain[0] in _WITH_VERB else plain[0]
        user_dir = None if config_dir is None else Path(config_dir).expanduser()
        offered = _overrides(verb, current, words, user_dir)
        if of_job:
            offered += _overrides("submit", current, words, user_dir)
    return [word for word in dict.fromkeys(offered) if word.startswith(current)]


def _overrides(verb: str, current: str, words: Sequence[str], user_dir: Path | None) -> list[str]:
    if verb not in VERBS:
        return []
    groups = groups_of(verb, user_dir)
    key, sign, value = current.partition("=")
    schema = schema_of(verb)
    if sign:
        return [f"{key}={text}" for text in _values(schema, key, value, groups, words)]
    keys = dict(_keys(schema, ""))
    offered = [f"{group}=" for group in groups]
    offered += ["from="] if verb in _TRAINING else []
    offered += ["launch=local", "num_processes="] if verb in LAUNCHED else []
    # The names up to the next point alone: there are hundreds of keys.
    depth = current.count(".") + 1
    for name in keys:
        parts = name.split(".")
        offered.append(f"{name}=" if len(parts) <= depth else f"{'.'.join(parts[:depth])}.")
    offered = [word for word in dict.fromkeys(offered) if word.startswith(current)]
    if len(offered) == 1 and offered[0].endswith("."):
        # A shell would put a space behind a section that is alone.
        return [f"{name}=" for name in keys if name.startswith(offered[0])]
    return offered


def _values(
    schema: type, key: str, value: str, groups: dict[str, list[str]], words: Sequence[str]
) -> list[str]:
    if key in groups:
        return groups[key]
    if key in _RUN_KEYS:
        names = run_names(Path(_value_of("runs_dir", words) or "runs").expanduser())
        return names + (_paths(value) if key == "from" else [])
    if key.rpartition(".")[2] in _PATH_KEYS:
        return _paths(value)
    return ["true", "false"] if dict(_keys(schema, "")).get(key) is bool else []


def _keys(schema: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a dataclass and those in it, each with its type."""
    hints = get_type_hints(schema)
    for field in fields(schema):
        name, kind = f"{prefix}{field.name}", hints[field.name]
        if is_dataclass(kind) and field.default_factory is not MISSING:
            yield from _keys(kind, f"{name}.") if isinstance(kind, type) else ()
        else:
            yield name, kind


def _paths(value: str) -> list[str]:
    return FilesCompleter()(prefix=value)


def _value_of(key: str, words: Sequence[str]) -> str | None:
    """Return the last value that ``words`` give to a key, or to an option in two words."""
    value = None
    for number, word in enumerate(words):
        name, sign, text = word.partition("=")
        if name == key and sign:
            value = text
        elif word == key and key.startswith("-"):
            value = next(iter(words[number + 1 : number + 2]), None)
    return value
