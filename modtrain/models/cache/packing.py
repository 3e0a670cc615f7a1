"""New tokens of several sequences, moved together where padding stands between or around them.

Shapes: N sequences, S new tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modtrain.models.depth.selection import first_places


class Packed(NamedTuple):
    """Tokens with each sequence's own first and padding behind them.

    counts: how many tokens of each sequence are its own. valid_NS: which ones; None: all.
    was_valid_NS: the same before packing. documents_NS: numbers of their documents.
    """

    tokens_NS: Tensor
    counts: list[int]
    valid_NS: Tensor | None = None
    was_valid_NS: Tensor | None = None
    documents_NS: Tensor | None = None

    def unpacked(self, x: Tensor) -> Tensor:
        """Put (N, S, …) back where the tokens stood; padding becomes zero."""
        if self.was_valid_NS is None:
            return x
        place_NS = (self.was_valid_NS.long().cumsum(dim=1) - 1).clamp(min=0)
        row_N1 = torch.arange(len(x), device=x.device).unsqueeze(1)
        is_own = self.was_valid_NS.view(*self.was_valid_NS.shape, *(1 for _ in x.shape[2:]))
        return x[row_N1, place_NS].where(is_own, torch.zeros((), dtype=x.dtype, device=x.device))

    def last(self, x: Tensor) -> Tensor:
        """Return what (N, S, …) holds at each sequence's last token: (N, 1, …)."""
        if self.valid_NS is None:
            return x[:, -1:]
        number_N = torch.arange(len(x), device=x.device)
        place_N = torch.tensor([max(0, count - 1) for count in self.counts], device=x.device)
        return x[number_N, place_N].unsqueeze(1)


def packed(tokens_NS: Tensor, valid_NS: Tensor | None, documents_NS: Tensor | None) -> Packed:
    """Pack the tokens; ``valid_NS`` is False for padding, None: there is none."""
    sequences, length = tokens_NS.shape
    counts = [length] * sequences if valid_NS is None else valid_NS.sum(dim=1).tolist()
    if valid_NS is None or min(counts) == length:
        return Packed(tokens_NS, counts, documents_NS=documents_NS)
    index_NS = first_places(valid_NS, length)
    if documents_NS is not None:
        documents_NS = documents_NS.gather(1, index_NS)
    own_NS = valid_NS.gather(1, index_NS)
    return Packed(tokens_NS.gather(1, index_NS), counts, own_NS, valid_NS, documents_NS)
