"""What a model keeps of the tokens that it has seen, so that the next ones can be run alone.

Each mixer has a `Store`: keys and values of attention, inputs of a convolution. Behind a depth
router it holds the tokens that took part and no others, so its rows are of different lengths.

Shapes: N sequences of the batch, L entries in use, K new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modtrain.models.cache.ragged_store import Entries, Store
from modtrain.models.config import ModelConfig


class CacheView(NamedTuple):
    """The store of a mixer, and the rows of it that the batch stands for.

    counts: how many of the new tokens of each sequence there are; the first ones.
    """

    store: Store
    rows: list[int]
    counts: list[int]

    def of(self, rows: list[int], counts: list[int]) -> CacheView:
        """Return the view of the sequences ``rows`` of the batch, so many new tokens of each."""
        return CacheView(self.store, [self.rows[row] for row in rows], counts)

    def append(
        self, fields: tuple[Tensor, ...], positions_NK: Tensor, documents_NK: Tensor | None
    ) -> None:
        """Add the new tokens; positions and documents may be those of one sequence for all."""
        self.store.append(self.rows, self.counts, fields, positions_NK, documents_NK)

    def is_whole(self) -> bool:
        """Whether the batch is all of the store, in order, or one row: what needs no copy."""
        return len(self.rows) == 1 or self.store.is_all(self.rows)

    def is_empty(self) -> bool:
        """Whether nothing is stored of any of these sequences."""
        return not any(self.store.lengths[row] for row in self.rows)

    def entries(self) -> Entries:
        """What is stored of these sequences."""
        return self.store.entries(self.rows)

    def positions(self) -> Tensor:
        """Where their tokens stand in the text (N, L)."""
        return self.store.positions(self.rows)

    def documents(self) -> Tensor:
        """The numbers of their documents (N, L)."""
        return self.store.documents(self.rows)

    def latest(self, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the newest ``count`` entries of a store with one field, and their documents.

        Where there are fewer, the field (N, count, …) has zeros in front, the documents
        (N, count) have -1. like: a field of new tokens (N, K, …).
        """
        rows = len(self.rows)
        if count == 0 or self.is_empty():
            nothing = like.new_zeros(rows, count, *like.shape[2:])
            return nothing, torch.full((rows, count), -1, device=like.device)
        entries, own_NL = self.entries(), self.documents()
        length_N1 = torch.tensor(entries.lengths, device=like.device).unsqueeze(1)
        place_NR = length_N1 - count + torch.arange(count, device=like.device)
        row_N1 = torch.arange(rows, device=like.device).unsqueeze(1)
        found = entries.fields[0][row_N1, place_NR.clamp(min=0)]
        is_there = place_NR >= 0
        shape = (*is_there.shape, *(1 for _ in like.shape[2:]))
        documents_NR = own_NL.gather(1, place_NR.clamp(min=0))
        return found.where(is_there.view(shape), 0), documents_NR.where(is_there, -1)


class Cache:
    """What a model has seen of a batch of sequences.

    Rows differ in length; each goes on, stops or is cut back by itself.

    margin: by how many tokens `truncate` may go back where a layer forgets what it no longer
    looks at; without sliding windows and convolutions it may go back to any place.
    counts_taken: also keep which tokens took part in each router, which a cap on them asks for.
    """

    def __init__(
        self, config: ModelConfig, batch: int, margin: int = 0, counts_taken: bool = False
    ) -> None:
        self.batch, self.margin = batch, margin
        self.seen = [0] * batch
        # What lay behind a window then may be gone, however far back the sequence is now.
        self._furthest = [0] * batch
        self.layers = [
            Store(batch, last=config.conv_width - 1, margin=margin)
            if mixer == "convolution"
            else Store(batch, window=config.sliding_window, margin=margin)
            for mixer in config.mixers
        ]
        routers = len(config.routed_parts) if counts_taken else 0
        self.taken = [Store(batch) for _ in range(routers)]

    def reset(self, row: int) -> None:
        """Forget a sequence, whose row another one may take."""
        self.seen[row] = self._furthest[row] = 0
        for store in (*self.layers, *self.taken):
            store.truncate([row], [0])

    def advance(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Count the new tokens of these sequences."""
        for row, count in zip(rows, counts, strict=True):
            self.seen[row] += count
            self._furthest[row] = max(self._furthest[row], self.seen[row])

    def truncate(self, seen: Sequence[int], rows: Sequence[int] | None = None) -> None:
        """Go back to where the sequences ``rows`` (None: all) had ``seen`` tokens each.

        Raises:
            ValueError: that is further on, or further back than ``margin`` from where the
                sequence ever was, and forgotten. Nothing is changed then.
        """
        rows = range(self.batch) if rows is None else rows
        for row, count in zip(rows, seen, strict=True):
            forgotten = self._furthest[row] - self.margin if self._forgets() else 0
            if not max(0, forgotten) <= count <= self.seen[row]:
                raise ValueError(
                    f"sequence {row} has {self.seen[row]} tokens: no way back to {count}"
                    f" with a margin of {self.margin} from {self._furthest[row]}"
                )
        for row, count in zip(rows, seen, strict=True):
            self.seen[row] = count
        for store in (*self.layers, *self.taken):
            store.truncate(rows, seen)

    def allocated_bytes(self) -> int:
        """Memory held."""
        return sum(store.allocated_bytes() for store in (*self.layers, *self.taken))

    def used_bytes(self) -> int:
        """Memory of what is stored."""
        return sum(store.used_bytes() for store in (*self.layers, *self.taken))

    def stored(self) -> list[list[int]]:
        """Entries in use by layer and sequence."""
        return [list(store.lengths) for store in self.layers]

    def _forgets(self) -> bool:
        return any(s.window is not None or s.last is not None for s in self.layers)
