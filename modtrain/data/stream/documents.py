"""Which document each token belongs to.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from torch import Tensor


def document_numbers(tokens_BS: Tensor, eos_id: int) -> Tensor:
    """Number the documents of each sequence: int64 (B, S), from 0 and rising by 1.

    The end-of-document token ``eos_id`` belongs to the document that it ends. What a sequence
    begins with may be the tail of a document that began in the one before; it has the number 0.
    """
    ends_BS = (tokens_BS == eos_id).long()
    return ends_BS.cumsum(dim=1) - ends_BS
