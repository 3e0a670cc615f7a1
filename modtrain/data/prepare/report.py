"""The report of ``modtrain prepare``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from modtrain.data.prepare.readers import FLAW_KINDS, Flaw
from modtrain.data.stream.index import IndexSummary


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
        for kind, count in summary.flaws.items():
            lines.append(f"left out: {count:,} {FLAW_KINDS.get(kind, kind)}")
            lines += [f"    {flaw}" for flaw in self.examples if flaw.kind == kind]
        return "\n".join(lines)
