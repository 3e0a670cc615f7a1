"""New tokens of several sequences, packed to the front with padding last.

Shapes: N sequences, S new tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modtrain.models.depth.selection import chosen_first
from modtrain.models.sequence import RoutingRecord


class PackedTokens(NamedTuple):
    """Tokens with each sequence's valid ones first and padding behind them.

    counts: number of valid tokens of each sequence. valid_NS: which ones; None: all.
    unpacked_valid_NS: the same before packing. documents_NS: their document numbers.
    """

    tokens_NS: Tensor
    counts: list[int]
    valid_NS: Tensor | None = None
    unpacked_valid_NS: Tensor | None = None
    documents_NS: Tensor | None = None

    def unpack(self, x: Tensor) -> Tensor:
        """Move (N, S, …) back to the tokens' original places; padding becomes zero."""
        if self.unpacked_valid_NS is None:
            return x
        valid_NS = self.unpacked_valid_NS
        index_NS = (valid_NS.long().cumsum(dim=1) - 1).clamp(min=0)
        row_N1 = torch.arange(len(x), device=x.device).unsqueeze(1)
        is_valid = valid_NS.view(*valid_NS.shape, *(1 for _ in x.shape[2:]))
        return x[row_N1, index_NS].where(is_valid, torch.zeros((), dtype=x.dtype, device=x.device))

    def unpack_record(self, record: RoutingRecord, valid_NS: Tensor | None) -> RoutingRecord:
        """Unpack what a router decided."""
        predictor_NS = record.predictor_BS
        return record._replace(
            scores_BS=self.unpack(record.scores_BS),
            chosen_BS=self.unpack(record.chosen_BS),
            predictor_BS=None if predictor_NS is None else self.unpack(predictor_NS),
            valid_BS=valid_NS,
        )

    def last(self, x: Tensor) -> Tensor:
        """Return the values (N, 1, …) of (N, S, …) at each sequence's last token."""
        if self.valid_NS is None:
            return x[:, -1:]
        row_N = torch.arange(len(x), device=x.device)
        index_N = torch.tensor([max(0, count - 1) for count in self.counts], device=x.device)
        return x[row_N, index_N].unsqueeze(1)


def pack(tokens_NS: Tensor, valid_NS: Tensor | None, documents_NS: Tensor | None) -> PackedTokens:
    """Pack the tokens; ``valid_NS`` is False for padding, None: no padding."""
    sequences, length = tokens_NS.shape
    counts = [length] * sequences if valid_NS is None else valid_NS.sum(dim=1).tolist()
    if valid_NS is None or min(counts) == length:
        return PackedTokens(tokens_NS, counts, documents_NS=documents_NS)
    index_NS = chosen_first(valid_NS, length)
    if documents_NS is not None:
        documents_NS = documents_NS.gather(1, index_NS)
    packed_valid_NS = valid_NS.gather(1, index_NS)
    packed_NS = tokens_NS.gather(1, index_NS)
    return PackedTokens(packed_NS, counts, packed_valid_NS, valid_NS, documents_NS)
