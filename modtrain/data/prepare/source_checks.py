"""Whether sources and options go together, before and after the sources are read."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from modtrain.common.errors import DataError, Problem, raise_if_any
from modtrain.data.config import PrepareConfig
from modtrain.data.prepare.encode import UnitRecord, too_many_flaws
from modtrain.data.prepare.flaws import Flaw
from modtrain.data.prepare.report import flaw_examples, flaw_lines
from modtrain.data.prepare.sources import SourceFile
from modtrain.data.prepare.units import Unit
from modtrain.data.stream.prepared import SplitSummary

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


def refuse_many_flaws(
    config: PrepareConfig, units: Sequence[Unit], records: Sequence[UnitRecord]
) -> None:
    """Raise DataError for more flaws than ``max_flaws``, where that is a limit."""
    count = sum(record.num_flaws for record in records)
    if config.on_error == "limit" and count > config.max_flaws:
        raise DataError(too_many_flaws(flaw_examples(units, records)[-1], config.max_flaws))


def refuse_empty_split(
    splits: dict[str, SplitSummary],
    examples: Sequence[Flaw],
    flaws: dict[str, int],
    config: PrepareConfig,
    *,
    has_tokens: bool,
) -> None:
    """Raise DataError where a split has no sequence.

    flaws: how many documents or files were left out, by kind. examples: of them.
    """
    if flaws and not any(split.num_documents for split in splits.values()):
        lines = [
            line for kind, count in flaws.items() for line in flaw_lines(kind, count, examples)
        ]
        raise DataError("\n".join(["the sources have no document without a flaw", *lines]))
    for name, split in splits.items():
        if split.num_sequences == 0:
            flaw_counts = ", ".join(f"{count} {kind}" for kind, count in flaws.items()) or "none"
            raise DataError(
                f"the split {name} would hold no sequence: its {split.num_documents} documents "
                f"give {split.num_tokens} tokens, and one sequence takes {config.seq_len + 1}. "
                f"{_remedy_for_empty_split(splits, config, has_tokens=has_tokens)} "
                f"Left out for their flaws: {flaw_counts}."
            )


def _remedy_for_empty_split(
    splits: dict[str, SplitSummary], config: PrepareConfig, *, has_tokens: bool
) -> str:
    tokens = sum(split.num_tokens for split in splits.values())
    least = config.seq_len + 2
    is_enough = min(config.valid_fraction, 1 - config.valid_fraction) * tokens > least
    if config.split_at == "document" and is_enough and not has_tokens:
        return (
            "There are few documents: add split_at=line, which holds out the end of each one, or"
            " name what ends a document inside a file: separator=..."
        )
    if tokens > 2 * least:
        return f"Raise valid_fraction={config.valid_fraction}, or choose a shorter seq_len."
    return "Choose a shorter seq_len, or add text."
