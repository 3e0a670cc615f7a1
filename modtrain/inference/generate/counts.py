"""What a decoder has run: tokens, passes, routed tokens and the memory of its caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from modtrain.models.sequence import RoutingRecord


@dataclass
class SequenceCount:
    """Tokens of one sequence that passes of the whole model ran, and by router the chosen ones."""

    tokens: int
    chosen_R: list[int]


@dataclass
class Statistics:
    """Counts of a decoder's work.

    prompt_tokens, generated_tokens: of all sequences. steps: passes of the whole model, counted per
    sequence. drafted, accepted: tokens of self-speculation, and those of them that were kept.
    chosen_R: routed tokens of these passes by router, of ``stepped_tokens``, rejected drafts
    included. by_sequence: the same of each sequence. cache_bytes: peak memory of the caches.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    stepped_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    chosen_R: list[int] = field(default_factory=list)
    by_sequence: list[SequenceCount] = field(default_factory=list)
    cache_bytes: int = 0

    def add_step(
        self,
        routing: Sequence[RoutingRecord],
        lengths: Sequence[int],
        numbers: Sequence[int],
        cache_bytes: int,
    ) -> None:
        """Count a pass of the whole model.

        routing: the records of its routers. lengths: tokens of each of the sequences ``numbers``.
        cache_bytes: memory that the caches have now.
        """
        self.cache_bytes = max(self.cache_bytes, cache_bytes)
        self.stepped_tokens += sum(lengths)
        by_sequence = [self.by_sequence[number] for number in numbers]
        for sequence, count in zip(by_sequence, lengths, strict=True):
            sequence.tokens += count
        for index, record in enumerate(routing):
            chosen_N = record.chosen_BS.sum(dim=1).tolist()
            self.chosen_R[index] += sum(chosen_N)
            for sequence, count in zip(by_sequence, chosen_N, strict=True):
                sequence.chosen_R[index] += count
