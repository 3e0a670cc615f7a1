"""Whether sources and options go together; what does not is refused, or told."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from modtrain.common.errors import Problem, raise_if_any
from modtrain.data.config import PrepareConfig
from modtrain.data.prepare.encode import UnitRecord
from modtrain.data.prepare.sources import SourceFile

_log = logging.getLogger(__name__)


def refuse_misfits(config: PrepareConfig, files: Sequence[SourceFile]) -> None:
    """Raise ConfigError for options that do not go with the kinds of the files."""
    problems = []
    if config.separator is not None and all(
        file.kind.partition(".")[0] != "text" for file in files
    ):
        reason, remedy = "is for .txt files, and the sources have none", "leave it out"
        problems.append(Problem("separator", config.separator, reason, remedy))
    named = [file.path for file in files if file.has_tokens]
    if named and config.tokenizer.path is None:
        reason = f"is null, and {named[0]} holds token numbers"
        remedy = "name the tokenizer that made them"
        problems.append(Problem("tokenizer.path", "", reason, remedy))
    if named and config.split_at == "line":
        reason = f"cuts texts, and {named[0]} holds token numbers"
        problems.append(Problem("split_at", "line", reason, "use split_at=document"))
    raise_if_any(problems)


def tell_unknown_ends(records: Sequence[UnitRecord]) -> None:
    """Warn where it is not known where the documents of token numbers end."""
    if count := sum(record.num_open_ends for record in records):
        _log.warning(
            "%d blocks of token numbers have no end token in their file: where their documents end"
            " is not known, and no end is marked",
            count,
        )


def refuse_unknown_ends(config: PrepareConfig, records: Sequence[UnitRecord]) -> None:
    """Raise ConfigError for a packing of whole documents whose ends are not known."""
    if any(record.num_open_ends for record in records):
        reason = "puts whole documents together, and the sources do not tell where some of them end"
        remedy = "use packing=concatenate, or sources with end tokens"
        raise_if_any([Problem("packing", config.packing, reason, remedy)])
