"""What a model is trained and evaluated on: inputs, targets, document numbers.

Shapes: B batch, S sequence, T = S + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modtrain.data.stream.documents import document_numbers


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
