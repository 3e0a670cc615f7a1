"""What a model is trained and evaluated on: inputs, targets, document numbers.

Shapes: B batch, S sequence, T = S + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Sequences for next-token prediction.

    inputs_BS: token ids. targets_BS: the ids that come next. documents_BS: document numbers of the
    inputs, if documents are masked from each other; else None.
    """

    inputs_BS: Tensor
    targets_BS: Tensor
    documents_BS: Tensor | None = None

    @classmethod
    def from_tokens(cls, tokens_BT: Tensor, eos_id: int | None = None) -> Batch:
        """Split sequences of S + 1 tokens. ``eos_id``: None: documents are not masked."""
        return cls.from_targets(tokens_BT[:, :-1], tokens_BT[:, 1:], eos_id)

    @classmethod
    def from_targets(cls, inputs_BS: Tensor, targets_BS: Tensor, eos_id: int | None) -> Batch:
        """Number the documents of the inputs; ``eos_id``: None: documents are not masked."""
        documents_BS = None if eos_id is None else document_numbers(inputs_BS, eos_id)
        return cls(inputs_BS, targets_BS, documents_BS)

    def to(self, device: torch.device) -> Batch:
        """Move all tensors to ``device``."""
        documents_BS = None if self.documents_BS is None else self.documents_BS.to(device)
        return Batch(self.inputs_BS.to(device), self.targets_BS.to(device), documents_BS)


def document_numbers(tokens_BS: Tensor, eos_id: int) -> Tensor:
    """Number the documents of each sequence: int64 (B, S), from 0 and rising by 1.

    The end-of-document token ``eos_id`` belongs to the document that it ends. What a sequence
    begins with may be the tail of a document that began in the one before; it has the number 0.
    """
    ends_BS = (tokens_BS == eos_id).long()
    return ends_BS.cumsum(dim=1) - ends_BS
