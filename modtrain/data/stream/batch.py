"""What a model is trained and evaluated on: inputs, targets, document numbers, padding.

Shapes: B batch, S sequence, T = S + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modtrain.common.ignored_target import IGNORED

PADDING = -1
"""In the place of a token where there is none, at the end of a sequence."""


class Batch(NamedTuple):
    """Sequences for next-token prediction.

    inputs_BS: token ids. targets_BS: the ids that come next. documents_BS: document numbers of the
    inputs, if documents are masked from each other; else None. valid_BS: where sequences may end
    with padding, False for it and for a token that it follows, which nothing reads; the targets
    there are -100. Else None. weight: what the mean loss of its targets counts for in a
    step, so that each target counts alike; None: 1, as all batches have equally many.
    """

    inputs_BS: Tensor
    targets_BS: Tensor
    documents_BS: Tensor | None = None
    valid_BS: Tensor | None = None
    weight: float | None = None

    @classmethod
    def from_tokens(
        cls, tokens_BT: Tensor, eos_id: int | None = None, *, has_padding: bool = False
    ) -> Batch:
        """Split sequences of S + 1 tokens. ``eos_id``: None: documents are not masked.

        has_padding: whether sequences may end with `PADDING`, even if none of these does.
        """
        if not has_padding:
            return cls.from_targets(tokens_BT[:, :-1], tokens_BT[:, 1:], eos_id)
        inputs_BS, targets_BS = tokens_BT[:, :-1].clamp(min=0), tokens_BT[:, 1:]
        valid_BS = targets_BS != PADDING
        batch = cls.from_targets(inputs_BS, targets_BS.where(valid_BS, IGNORED), eos_id)
        return batch._replace(valid_BS=valid_BS)

    @classmethod
    def from_targets(cls, inputs_BS: Tensor, targets_BS: Tensor, eos_id: int | None) -> Batch:
        """Number the documents of the inputs; ``eos_id``: None: documents are not masked."""
        documents_BS = None if eos_id is None else document_numbers(inputs_BS, eos_id)
        return cls(inputs_BS, targets_BS, documents_BS)

    @property
    def num_targets(self) -> int:
        """How many tokens are predicted; on a device it waits for it."""
        return int((self.targets_BS != IGNORED).sum())

    def masks(self) -> dict[str, Any]:
        """Return what `Transformer.forward` has to know of the tokens, by its parameters."""
        masks: dict[str, Any] = {"documents_BS": self.documents_BS}
        if self.valid_BS is not None:
            masks |= {"valid_BS": self.valid_BS, "is_right_padded": True}
        return masks

    def first(self) -> Batch:
        """Return the first sequence alone."""
        return self._map(lambda x_BS: x_BS[:1])

    def to(self, device: torch.device) -> Batch:
        """Move all tensors to ``device``."""
        return self._map(lambda x_BS: x_BS.to(device))

    def pin_memory(self) -> Batch:
        """Copy all tensors to pinned memory."""
        return self._map(lambda x_BS: x_BS.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with other tensors in the place of its own."""
        documents_BS, valid_BS = (
            None if x_BS is None else change(x_BS) for x_BS in (self.documents_BS, self.valid_BS)
        )
        return Batch(
            change(self.inputs_BS), change(self.targets_BS), documents_BS, valid_BS, self.weight
        )


def document_numbers(tokens_BS: Tensor, eos_id: int) -> Tensor:
    """Number the documents of each sequence: int64 (B, S), from 0 and rising by 1.

    The end-of-document token ``eos_id`` belongs to the document that it ends. What a sequence
    begins with may be the tail of a document that began in the one before; it has the number 0.
    """
    ends_BS = (tokens_BS == eos_id).long()
    return ends_BS.cumsum(dim=1) - ends_BS
