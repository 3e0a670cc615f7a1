"""Whether sources, options and tokenizer go together; what does not is refused, or told."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from modtrain.common.errors import ConfigError, Problem, raise_if_any
from modtrain.data.config import PrepareConfig
from modtrain.data.prepare.encode import UnitRecord
from modtrain.data.prepare.sources import SourceFile
from modtrain.data.prepare.tokenizer import parse_tokenizer
from modtrain.data.prepare.tokenizer_path import end_token

_log = logging.getLogger(__name__)


def refuse_unused_separator(config: PrepareConfig, files: Sequence[SourceFile]) -> None:
    """Raise ConfigError for a separator where no source is text."""
    if config.separator is not None and all(
        file.kind.partition(".")[0] != "text" for file in files
    ):
        reason, remedy = "is for .txt files, and the sources have none", "leave it out"
        raise ConfigError([Problem("separator", config.separator, reason, remedy)])


def refuse_tokens_without_tokenizer(config: PrepareConfig, files: Sequence[SourceFile]) -> None:
    """Raise ConfigError for token numbers without their tokenizer, or cut as texts are."""
    named = [file.path for file in files if file.has_tokens]
    problems = []
    if named and config.tokenizer.path is None:
        reason = f"is null, and {named[0]} holds token numbers"
        remedy = "name the tokenizer that made them"
        problems.append(Problem("tokenizer.path", "", reason, remedy))
    if named and config.split_at == "line":
        reason = f"cuts texts, and {named[0]} holds token numbers"
        problems.append(Problem("split_at", "line", reason, "use split_at=document"))
    raise_if_any(problems)


def tell_other_end(content: bytes, path: str, eos_id: int) -> None:
    """Warn where a folder declares another end token than the one that is taken by its name."""
    declared = end_token(path)
    tokenizer = parse_tokenizer(content, path)
    if declared is not None and tokenizer.token_to_id(declared) != eos_id:
        taken = tokenizer.id_to_token(eos_id)
        _log.warning(
            "%s declares the end token %s; documents end with %s, as everywhere in modtrain",
            *(path, declared, taken),
        )


def tell_unknown_ends(records: Sequence[UnitRecord]) -> None:
    """Warn where it is not known where the documents of token numbers end."""
    if count := sum(record.num_open_ends for record in records):
        _log.warning(
            "%d blocks of token numbers have no end token in their file: where their documents end"
            " is not known, and no end is marked",
            count,
        )
