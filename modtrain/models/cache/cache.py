"""The state of a model's mixers from earlier tokens, for decoding token by token.

Each mixer has a `RaggedStore`: keys and values of attention, inputs of a convolution. In a routed
layer it holds only the tokens that were routed, so its rows differ in length.

Shapes: N sequences of the batch, L entries in use, K new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modtrain.models.cache.ragged_store import RaggedStore
from modtrain.models.config import ModelConfig


class CacheView(NamedTuple):
    """The store of a mixer, and the rows of it that a batch uses.

    counts: number of valid new tokens of each sequence, which come first.
    """

    store: RaggedStore
    rows: list[int]
    counts: list[int]

    def select_rows(self, rows: list[int], counts: list[int]) -> CacheView:
        """Return the view of the batch's sequences ``rows``, with ``counts`` new tokens each."""
        return CacheView(self.store, [self.rows[row] for row in rows], counts)

    def append(
        self, fields: tuple[Tensor, ...], positions_NK: Tensor, documents_NK: Tensor | None
    ) -> None:
        """Add the new tokens; positions and documents may have one row for all sequences."""
        self.store.append(self.rows, self.counts, fields, positions_NK, documents_NK)

    @property
    def lengths(self) -> list[int]:
        """Number of stored entries of each sequence."""
        return [self.store.lengths[row] for row in self.rows]

    def latest(self, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the newest ``count`` entries of a store with one field, and their documents.

        If there are fewer, the field (N, count, …) is padded with zeros in front, and the documents
        (N, count) with -1. like: a field of new tokens (N, K, …).
        """
        rows, lengths = len(self.rows), self.lengths
        if count == 0 or not any(lengths):
            zeros = like.new_zeros(rows, count, *like.shape[2:])
            return zeros, torch.full((rows, count), -1, device=like.device)
        (field_NL,), documents_NL = self.store.fields(self.rows), self.store.documents(self.rows)
        length_N1 = torch.tensor(lengths, device=like.device).unsqueeze(1)
        index_NR = length_N1 - count + torch.arange(count, device=like.device)
        row_N1 = torch.arange(rows, device=like.device).unsqueeze(1)
        values = field_NL[row_N1, index_NR.clamp(min=0)]
        exists_NR = index_NR >= 0
        shape = (*exists_NR.shape, *(1 for _ in like.shape[2:]))
        documents_NR = documents_NL.gather(1, index_NR.clamp(min=0))
        return values.where(exists_NR.view(shape), 0), documents_NR.where(exists_NR, -1)


class Cache:
    """The cached state of a model for a batch of sequences.

    Rows differ in length; each is extended and truncated independently.

    seen: number of tokens of each sequence in the cache. routed: one store per router.
    margin: by how many tokens `truncate` may go back if a layer drops entries outside its window;
    without sliding windows and convolutions it may go back to any length.
    tracks_routed: also store which tokens each router took, needed for a layer cap.
    """

    def __init__(
        self, config: ModelConfig, batch: int, margin: int = 0, tracks_routed: bool = False
    ) -> None:
        self.batch, self.margin = batch, margin
        self.seen = [0] * batch
        # The longest length so far: entries outside the window then may be dropped already.
        self._max_seen = [0] * batch
        self.layers = [
            RaggedStore(batch, last=config.conv_width - 1, margin=margin)
            if mixer == "convolution"
            else RaggedStore(batch, window=config.sliding_window, margin=margin)
            for mixer in config.mixers
        ]
        routers = len(config.routed_parts) if tracks_routed else 0
        self.routed = [RaggedStore(batch) for _ in range(routers)]

    def reset(self, row: int) -> None:
        """Clear a row for another sequence."""
        self.seen[row] = self._max_seen[row] = 0
        for store in (*self.layers, *self.routed):
            store.truncate([row], [0])

    def advance(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Count the new tokens of these sequences."""
        for row, count in zip(rows, counts, strict=True):
            self.seen[row] += count
            self._max_seen[row] = max(self._max_seen[row], self.seen[row])

    def truncate(self, seen: Sequence[int], rows: Sequence[int] | None = None) -> None:
        """Truncate the sequences ``rows`` (None: all) to their first ``seen`` tokens.

        Raises:
            ValueError: a sequence is shorter, or was longer by more than ``margin`` and layers drop
                entries. Nothing is changed then.
        """
        rows = range(self.batch) if rows is None else rows
        drops = any(s.window is not None or s.last is not None for s in self.layers)
        for row, count in zip(rows, seen, strict=True):
            shortest = self._max_seen[row] - self.margin if drops else 0
            if not max(0, shortest) <= count <= self.seen[row]:
                raise ValueError(
                    f"sequence {row} has {self.seen[row]} tokens: cannot truncate to {count}"
                    f" with a margin of {self.margin} from {self._max_seen[row]}"
                )
        for row, count in zip(rows, seen, strict=True):
            self.seen[row] = count
        for store in (*self.layers, *self.routed):
            store.truncate(rows, seen)

    def allocated_bytes(self) -> int:
        """Allocated memory."""
        return sum(store.allocated_bytes() for store in (*self.layers, *self.routed))
