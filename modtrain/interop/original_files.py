"""What an imported folder's files say of texts, beside the tokenizer: kept for a later export.

They are data: JSON without what names code or other files, and Jinja that is not run here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modtrain.common.errors import DataError
from modtrain.common.reading import UnreadableError, read_bytes, read_json

CONFIG_NAME = "config.json"
GENERATION, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
SPECIAL_TOKENS, CHAT_TEMPLATE = "special_tokens_map.json", "chat_template.jinja"
TABLES = (CONFIG_NAME, GENERATION, TOKENIZER_CONFIG, SPECIAL_TOKENS)
_MORE_TEMPLATES, _MOST_TEMPLATES = "additional_chat_templates", 32
_MAX_JSON_BYTES, _MAX_TEMPLATE_BYTES = 2**24, 2**20
# What makes a loader run code, or look for other files.
_LEFT_OUT = re.compile(r"^_|^auto_map$|^init_inputs$|^processor_class$|file|path|_dir$")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MOST_ID = 2**31 - 1


def read_tables(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the content of the folder's JSON files about texts, by name.

    Raises:
        DataError: one is damaged.
    """
    return {
        name: _plain(_optional_json(folder / name), name)
        for name in TABLES
        if name != CONFIG_NAME and (folder / name).exists()
    }


def read_template(folder: Path) -> str | None:
    """Return ``chat_template.jinja``. Raises DataError: it cannot be read."""
    path = folder / CHAT_TEMPLATE
    return _text_file(path) if path.exists() else None


def named_templates(folder: Path) -> dict[str, str]:
    """Return further chat templates by name, which a folder may have beside the default.

    Raises:
        DataError: one cannot be read, or there are more than a model has.
    """
    paths = sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))
    if len(paths) > _MOST_TEMPLATES:
        raise DataError(f"{folder / _MORE_TEMPLATES} has more than {_MOST_TEMPLATES} templates")
    return {path.stem: _text_file(path) for path in paths}


def token_ids(value: object) -> tuple[int, ...]:
    """Return a token's number, or a list of them, as a tuple; what is none is left out."""
    values = value if isinstance(value, list) else [value]
    return tuple(n for n in values if type(n) is int and 0 <= n <= _MOST_ID)


def config_ids(config: Any) -> dict[str, int | list[int] | None]:
    """Return the numbers of special tokens in transformers' configuration ``config``."""
    ids: dict[str, int | list[int] | None] = {}
    for key in _TOKEN_IDS:
        value = getattr(config, key, None)
        known = token_ids(value)
        ids[key] = [*known] if isinstance(value, list) and known else known[0] if known else None
    return ids


def check_files(files: object) -> dict[str, Any]:
    """Return ``files`` as they are. Raises ValueError if they are none of such a folder."""
    if not isinstance(files, Mapping):
        raise ValueError("files is no table")
    for name, content in files.items():
        kind = str if name == CHAT_TEMPLATE else dict if name in TABLES else None
        if kind is None or not isinstance(content, kind):
            raise ValueError(f"{name!r} is no file of a tokenizer")
    return dict(files)


def write_files(files: Mapping[str, Any], folder: Path) -> None:
    """Write what `read_tables` and `read_template` returned, ``config.json`` left out."""
    for name, content in files.items():
        if name != CONFIG_NAME:
            text = content if isinstance(content, str) else json.dumps(content, indent=2)
            (folder / name).write_text(text, encoding="utf-8")


def _plain(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if not _LEFT_OUT.search(key)}
    if name == GENERATION:
        # Tables are settings of a cache, of compilation and of watermarks, not of a text.
        kept = {key: value for key, value in kept.items() if not isinstance(value, dict)}
        for key in kept:
            if key in _TOKEN_IDS and not isinstance(kept[key], list):
                kept[key] = next(iter(token_ids(kept[key])), None)
            elif key in _TOKEN_IDS:
                kept[key] = [*token_ids(kept[key])]
    return kept


def _text_file(path: Path) -> str:
    try:
        return read_bytes(path, _MAX_TEMPLATE_BYTES).decode()
    except (UnreadableError, UnicodeDecodeError) as error:
        raise DataError(f"{path.parent}/{error}") from None


def _optional_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, _MAX_JSON_BYTES)
    except UnreadableError as error:
        raise DataError(f"{path.parent}/{error}") from None
