"""A gated causal depthwise convolution in place of attention.

Shapes: B batch, S sequence, D model, W width of the convolution, R = W - 1 preceding tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modtrain.models.config import ModelConfig
from modtrain.models.norm import RMSNorm
from modtrain.models.sequence import SequenceContext


class Convolution(nn.Module):
    """Pre-norm; each feature mixes with the same feature of the W - 1 preceding tokens.

    A multiplicative gate makes the mixing depend on content, as in Hyena's short filters
    (arXiv 2302.10866). Like attention it runs among the given tokens: in a routed block, the chosen
    ones.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.value = nn.Linear(config.d_model, config.d_model, bias=False)
        self.gate = nn.Linear(config.d_model, config.d_model, bias=False)
        self.taps = nn.Parameter(self.value.weight.new_zeros(config.conv_width, config.d_model))
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Tensor:
        """Return the update (B, S, D). The tokens come in the order of their positions."""
        x_BSD = self.norm(x_BSD)
        value_BSD = self.value(x_BSD)
        mixed_BSD = self.mix(value_BSD, self.weights().to(value_BSD.dtype), context)
        out: Tensor = self.out(F.silu(self.gate(x_BSD)) * mixed_BSD)
        return out

    def mix(self, value_BSD: Tensor, taps_WD: Tensor, context: SequenceContext) -> Tensor:
        """Return the mixed values (B, S, D); context parallelism overrides it."""
        return apply_taps(with_left_context(value_BSD, context, len(taps_WD) - 1), taps_WD)

    def weights(self) -> Tensor:
        """Return the taps (W, D); a method, which parallelism overrides."""
        return self.taps


class LeftContext(NamedTuple):
    """The tokens after the W - 1 tokens before them, zero-padded: T = W - 1 + S."""

    value_BTD: Tensor
    documents_BT: Tensor | None
    valid_BT: Tensor | None


def apply_taps(tokens: LeftContext, taps_WD: Tensor) -> Tensor:
    """Return the sum over taps (B, S, D), without padding and other documents."""
    reach = len(taps_WD) - 1
    length = tokens.value_BTD.shape[1] - reach
    mixed_BSD = tokens.value_BTD[:, reach:] * taps_WD[0]
    for offset in range(1, reach + 1):
        shifted = slice(reach - offset, reach - offset + length)
        shifted_BSD = tokens.value_BTD[:, shifted]
        mask_BS: Tensor | None = None
        if tokens.documents_BT is not None:
            mask_BS = tokens.documents_BT[:, shifted] == tokens.documents_BT[:, reach:]
        if tokens.valid_BT is not None:
            valid_BS = tokens.valid_BT[:, shifted]
            mask_BS = valid_BS if mask_BS is None else mask_BS & valid_BS
        if mask_BS is not None:
            shifted_BSD = shifted_BSD.where(mask_BS.unsqueeze(-1), 0)
        mixed_BSD = mixed_BSD + shifted_BSD * taps_WD[offset]
    return mixed_BSD


def with_left_context(value_BSD: Tensor, context: SequenceContext, reach: int) -> LeftContext:
    """Return the values of these tokens and of the ``reach`` tokens before them."""
    documents_BS, valid_BS, cache = context.documents_BS, context.valid_BS, context.cache
    if cache is None:
        return LeftContext(
            F.pad(value_BSD, (0, 0, reach, 0)),
            None if documents_BS is None else F.pad(documents_BS, (reach, 0), value=-1),
            None if valid_BS is None else F.pad(valid_BS, (reach, 0), value=False),
        )
    stored_BRD, stored_documents_BR = cache.latest(reach, value_BSD)
    cache.append((value_BSD,), context.positions_BS, documents_BS)
    # Padding comes after all valid tokens, so no token reads it.
    return LeftContext(
        torch.cat([stored_BRD, value_BSD], dim=1),
        None if documents_BS is None else torch.cat([stored_documents_BR, documents_BS], dim=1),
        None,
    )
