"""Words on the command line that are no ``key=value``, and what was meant by them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from modtrain.common.config_keys import all_keys, nearest_keys
from modtrain.common.errors import Problem
from modtrain.common.other_tools import key_here, sentence_for
from modtrain.common.overrides import unknown_key
from modtrain.common.spelling import (
    in_quotes,
    is_unclosed,
    kind_of,
    list_items,
    node_of,
    spelling,
)

# The key that a verb's first word would be, where that is not ``run`` or ``name``.
_MAIN_KEYS = {"prepare": "sources", "fit": "points", "report": "runs", "search": "study"}
# The key of the next word, where the first one has its value.
_SECOND_KEYS = {"generate": "prompt", "inspect": "text", "export": "output", "import": "name"}
# Keys whose values are mostly one word.
_PATHS, _NAMES = ("path", "runs_dir", "output", "data_path"), ("name", "run", "study")
_SHOWN = 3
_GENERIC = "write key=value or group=name"


def is_word(override: str) -> bool:
    """Whether ``override`` gives no value, and takes nothing out either."""
    return bool(override.strip()) and "=" not in override and not override.startswith(("~", "+"))


def word_problems(
    verb: str, overrides: Sequence[str], config: DictConfig, choices: Callable[[str], list[str]]
) -> list[Problem]:
    """Return a problem for each group of words in ``overrides`` that belong together.

    config: what the other overrides give. choices: of a group, by its name; empty for no group.
    """
    return list(_problems(verb, list(overrides), config, choices))


def advised_keys(problems: Sequence[Problem]) -> set[str]:
    """Return the keys to which remedies say to give a value: they need no problem of their own."""
    advised = (re.match(r"(?:write '?\+*|did you mean )([\w.]+)", p.remedy) for p in problems)
    return {match[1] for match in advised if match}


def _problems(
    verb: str, texts: list[str], config: DictConfig, choices: Callable[[str], list[str]]
) -> Iterator[Problem]:
    at = 0
    while at < len(texts):
        if not is_word(texts[at]):
            at += 1
            continue
        end = at + 1
        while end < len(texts) and is_word(texts[end]):
            end += 1
        words = texts[at:end]
        before = texts[at - 1] if at else ""
        while words:
            is_next = len(words) < end - at
            problem, used = _problem(verb, before, words, config, choices, is_next)
            yield problem
            words, before = words[used:], ""
        at = end


def _problem(
    verb: str,
    before: str,
    words: list[str],
    config: DictConfig,
    choices: Callable[[str], list[str]],
    is_next: bool,
) -> tuple[Problem, int]:
    """Return the problem of the first of ``words``, and of how many it is.

    is_next: whether a word before it was the value of the verb's main key.
    """
    if before and (joined := _joined(before, words, config, choices)):
        return joined
    word, reason = words[0], "has no value"
    named = word if choices(word) else _key_named(word, config)
    if named is not None:
        value = words[1] if len(words) > 1 else "…"
        spelled = spelling(config, named, value) if not choices(word) and value != "…" else None
        return Problem(word, "", reason, f"write {spelled or f'{named}={value}'}"), len(words[:2])
    key = _MAIN_KEYS.get(verb, "run" if "run" in config else "name")
    if is_next or (key in config and config[key] is not None):
        key = _SECOND_KEYS.get(verb, key)
        if key in ("prompt", "text"):
            return Problem(word, "", reason, f"write {in_quotes(key, ' '.join(words))}"), len(words)
    if key in config and OmegaConf.is_list(config[key]) and not _choice_of(word, config, choices):
        remedy = f"write {spelling(config, key, _pattern(words, config))}"
        return Problem(" ".join(words[:3]), "", reason, remedy), len(words)
    remedy = _meant(key, word, config, choices)
    given, _, text = before.lstrip("+").partition("=")
    if remedy == _GENERIC and given in _NAMES and _may_be_text(text):
        whole = " ".join([text, *words])
        remedy = f"write {in_quotes(given, whole)}"
        return Problem(given, whole, "is in several words", remedy), len(words)
    return Problem(word, "", reason, remedy), 1


def _joined(
    before: str, words: list[str], config: DictConfig, choices: Callable[[str], list[str]]
) -> tuple[Problem, int] | None:
    """Return the problem of a value that goes on in ``words``, and in how many of them.

    before: the override with its beginning. None where the words are not of it.
    """
    key, _, text = before.lstrip("+").partition("=")
    known, reason = all_keys(config), "is in several words"
    target = key if key in known else key_here(key, known, ())
    if target is None:
        whole = " ".join([text, *words])
        is_text = "." not in key and " " not in key and _may_be_text(text)
        return (unknown_key(key, whole, config), len(words)) if is_text else None
    is_list = OmegaConf.is_list(node_of(config, target))
    if is_unclosed(text) and (is_list or kind_of(config, target) is Any):
        used = 1
        while used < len(words) and is_unclosed(" ".join([text, *words[:used]])):
            used += 1
        whole = " ".join([text, *words[:used]])
        remedy = spelling(config, target, whole) or in_quotes(target, whole)
        return Problem(key, whole, reason, f"write {remedy}"), used
    if is_list:
        others = [n for n, word in enumerate(words) if _is_another(word, config, choices)]
        words = words[: others[0] if others else None]
        whole = " ".join([text, *words])
        items = [*list_items(text), *(item for word in words for item in list_items(word))]
        spelled = spelling(config, target, _pattern(items, config)) if words else None
        return (Problem(key, whole, reason, f"write {spelled}"), len(words)) if spelled else None
    if not _takes_text(config, target, text, words):
        return None
    whole = " ".join([text, *words])
    return Problem(key, whole, reason, f"write {in_quotes(target, whole)}"), len(words)


def _is_another(word: str, config: DictConfig, choices: Callable[[str], list[str]]) -> bool:
    """Whether ``word`` names a key or a group, rather than one more item of a list."""
    return bool(choices(word)) or word in all_keys(config)


def _may_be_text(text: str) -> bool:
    """Whether ``text`` has words, and no quotes or brackets around it."""
    has_marks = text[:1] in tuple("'\"[{") or text[-1:] in tuple("'\"]}")
    return re.search(r"[A-Za-z]", text) is not None and not has_marks


def _takes_text(config: DictConfig, key: str, text: str, words: list[str]) -> bool:
    """Whether the words behind ``key=text`` may be the rest of a text."""
    if not _may_be_text(text) or kind_of(config, key) is not str:
        return False
    name = key.rpartition(".")[2]
    if name in _PATHS and Path(" ".join([text, *words])).exists():
        return True
    if name in _PATHS and "/" in text and "/" in words[0]:
        # A folder with a blank in its name; else a path that is a word of its own.
        return not Path(words[0]).exists()
    # A name of one word is whole; a word behind it is another one.
    return name not in (*_PATHS, *_NAMES)


def _key_named(word: str, config: DictConfig) -> str | None:
    """Return the key that ``word`` is, or that has this name in its section."""
    near = nearest_keys(word, all_keys(config))
    return near[0] if near and near[0].rpartition(".")[2] == word.rpartition(".")[2] else None


def _choice_of(word: str, config: DictConfig, choices: Callable[[str], list[str]]) -> str | None:
    """Return the group that has the choice ``word``."""
    groups = [*map(str, config), "experiment", "corpus"]
    return next((group for group in groups if word in choices(group)), None)


def _pattern(words: list[str], config: DictConfig) -> str:
    """Return the words as one text, a list's; many files as the pattern that a shell expanded."""
    runs_dir = config.get("runs_dir")
    names = [word.removeprefix(f"{runs_dir}/") if runs_dir else word for word in words]
    parents, ends = {Path(name).parent for name in names}, {Path(name).suffix for name in names}
    if len(names) > _SHOWN and len(parents) == len(ends) == 1:
        return str(parents.pop() / f"*{ends.pop()}")
    return ",".join(names)


def _meant(key: str, word: str, config: DictConfig, choices: Callable[[str], list[str]]) -> str:
    """Return the remedy for a word that is neither a key nor a group. key: the verb's main one."""
    if group := _choice_of(word, config, choices):
        return f"write {group}={word}"
    if word.endswith((".yaml", ".yml")) and "budget" in config:
        return f"write from={word}"
    if sentence := sentence_for(word, "", all_keys(config)):
        return sentence
    if key not in config or config[key] is not None:
        return _GENERIC
    name = word.rstrip("/").removeprefix(f"{config.get('runs_dir', '')}/")
    spelled = spelling(config, key, name if key in ("run", "name", "study") else word)
    return f"write {spelled}" if spelled else _GENERIC
