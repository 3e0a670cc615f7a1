"""Which token ends a document, of a tokenizer that does not call it by a usual name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from modtrain.common.errors import ConfigError, DataError, Problem
from modtrain.common.reading import UnreadableError, read_json
from modtrain.data.config import TokenizerConfig
from modtrain.data.prepare.tokenizer import known_end_ids, special_tokens
from modtrain.data.stream.prepared import INDEX_NAME
from modtrain.data.tokenizers.source import TokenizerSource

_log = logging.getLogger(__name__)

# Hugging Face's files beside a tokenizer.json, with the key that names the end of a text. Their
# texts come before their numbers, which may be those of another tokenizer.
_DECLARATIONS = (
    ("tokenizer_config.json", "eos_token"),
    ("special_tokens_map.json", "eos_token"),
    ("generation_config.json", "eos_token_id"),
    ("config.json", "eos_token_id"),
    (INDEX_NAME, "eos_id"),
)
_MAX_BYTES = 2**28


def chosen_end_token(
    config: TokenizerConfig, tokenizer: Tokenizer, source: TokenizerSource
) -> str | None:
    """Return the end token that ``config`` names, or that the tokenizer's files declare.

    None where the tokenizer calls it by a usual name, or nothing declares one. source: from which
    the tokenizer was parsed.

    Raises:
        ConfigError: the tokenizer has no such token; names those it has.
        DataError: a file is damaged.
    """
    path = source.path
    if config.end_token is not None:
        if tokenizer.token_to_id(config.end_token) is None:
            reason = f"is no token of {path}"
            remedy = f"its special tokens are {special_tokens(tokenizer)}"
            raise ConfigError([Problem("tokenizer.end_token", config.end_token, reason, remedy)])
        known = known_end_ids(tokenizer)
        if known and tokenizer.token_to_id(config.end_token) == known[0]:
            # It would be taken anyway.
            return None
        return config.end_token
    declared = source.end_token or next(_declared(path.parent, tokenizer), None)
    known = known_end_ids(tokenizer)
    if not known:
        return declared
    if declared is not None and tokenizer.token_to_id(declared) not in known:
        _log.warning(
            "%s declares the end token %s; documents end with %s, unless tokenizer.end_token says"
            " otherwise",
            *(path.parent, declared, tokenizer.id_to_token(known[0])),
        )
    return None


def _declared(folder: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the tokens of ``tokenizer`` that the files in ``folder`` say end a text."""
    for name, key in _DECLARATIONS:
        if not (folder / name).is_file():
            continue
        try:
            value = read_json(folder / name, _MAX_BYTES).get(key)
        except UnreadableError as error:
            raise DataError(f"{folder}/{error}") from None
        for item in value if isinstance(value, list) else [value]:
            token = _token(item, tokenizer)
            if token is not None:
                yield token


def _token(value: Any, tokenizer: Tokenizer) -> str | None:
    if type(value) is int and 0 <= value < 2**31:
        number: str | None = tokenizer.id_to_token(value)
        return number
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and tokenizer.token_to_id(text) is not None else None
