"""What a prepare has made and what it has left out, for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from modtrain.data.prepare.documents import lines_before
from modtrain.data.prepare.encode import EXAMPLES_OF_A_KIND, UnitRecord
from modtrain.data.prepare.flaws import FLAW_KINDS, Flaw
from modtrain.data.prepare.units import Unit
from modtrain.data.stream.prepared import IndexSummary


@dataclass(frozen=True)
class PrepareReport:
    """The result of a prepare.

    was_complete: whether an earlier run had done all of it.
    examples: the first few flaws of each kind; none where ``was_complete``.
    """

    output: Path
    summary: IndexSummary
    was_complete: bool
    examples: list[Flaw] = field(default_factory=list)

    def __str__(self) -> str:
        summary = self.summary
        done = "was complete already" if self.was_complete else "is complete"
        lines = [
            f"{self.output} {done}: {summary.num_files} files, vocabulary {summary.vocab_size}, "
            f"sequences of {summary.seq_len} tokens",
            f"{'split':<8}{'documents':>12}{'MB':>10}{'tokens':>15}{'sequences':>12}"
            f"{'bytes/token':>13}{'dropped':>9}",
        ]
        for name, split in summary.splits.items():
            lines.append(
                f"{name:<8}{split.num_documents:>12,}{split.num_bytes / 1e6:>10.1f}"
                f"{split.num_tokens:>15,}{split.num_sequences:>12,}"
                f"{split.num_bytes / max(1, split.num_tokens):>13.2f}{split.dropped_tokens:>9,}"
            )
        lines += summary.packing_lines()
        for kind, count in summary.flaws.items():
            lines += flaw_lines(kind, count, self.examples)
        return "\n".join(lines)


def flaw_lines(kind: str, count: int, examples: Sequence[Flaw]) -> list[str]:
    """Describe the flaws of one kind."""
    shown = [f"    {flaw}" for flaw in examples if flaw.kind == kind]
    return [f"left out: {count:,} {FLAW_KINDS.get(kind, kind)}", *shown]


def flaw_counts(records: Sequence[UnitRecord]) -> dict[str, int]:
    """Count the documents or files that were left out, by kind of flaw."""
    kinds = sorted({kind for record in records for kind in record.flaws})
    return {kind: sum(record.flaws.get(kind, 0) for record in records) for kind in kinds}


def flaw_examples(units: Sequence[Unit], records: Sequence[UnitRecord]) -> list[Flaw]:
    """The first few flaws of each kind, their lines counted from the start of the file."""
    shown: dict[str, int] = {}
    examples = []
    for before, record in zip(lines_before(units, records), records, strict=True):
        for flaw in record.examples:
            shown[flaw.kind] = shown.get(flaw.kind, 0) + 1
            if shown[flaw.kind] <= EXAMPLES_OF_A_KIND:
                examples.append(replace(flaw, line=flaw.line + before))
    return examples
