"""A gated causal depthwise convolution in attention's place.

Shapes: B batch, S sequence, D model, W width of the convolution, R = W - 1 tokens before.
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
    """Pre-norm; each feature mixes with the same feature of the W - 1 tokens before it.

    A multiplicative gate makes the mixing depend on the content, as in Hyena's short filters
    (arXiv 2302.10866). Like attention it runs among the tokens that it is given: routed, it reaches
    over the chosen ones.
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
        """Return the mixed values (B, S, D).

        A method, so that ranks that have shares of a sequence can ask for what stands before them.
        """
        return mixed(with_before(value_BSD, context, len(taps_WD) - 1), taps_WD)

    def weights(self) -> Tensor:
        """Return the taps (W, D), to compute with."""
        return self.taps


class Before(NamedTuple):
    """The tokens with the W - 1 before them, zeros where there are none: T = W - 1 + S."""

    value_BTD: Tensor
    documents_BT: Tensor | None
    valid_BT: Tensor | None


def mixed(before: Before, taps_WD: Tensor) -> Tensor:
    """Return the sum over taps (B, S, D); a token takes nothing from padding or other documents."""
    reach = len(taps_WD) - 1
    length = before.value_BTD.shape[1] - reach
    mixed_BSD = before.value_BTD[:, reach:] * taps_WD[0]
    for back in range(1, reach + 1):
        there = slice(reach - back, reach - back + length)
        before_BSD = before.value_BTD[:, there]
        sees_BS: Tensor | None = None
        if before.documents_BT is not None:
            sees_BS = before.documents_BT[:, there] == before.documents_BT[:, reach:]
        if before.valid_BT is not None:
            valid_BS = before.valid_BT[:, there]
            sees_BS = valid_BS if sees_BS is None else sees_BS & valid_BS
        if sees_BS is not None:
            before_BSD = before_BSD.where(sees_BS.unsqueeze(-1), 0)
        mixed_BSD = mixed_BSD + before_BSD * taps_WD[back]
    return mixed_BSD


def with_before(value_BSD: Tensor, context: SequenceContext, reach: int) -> Before:
    """Return the values of these tokens and of the ``reach`` before them."""
    documents_BS, valid_BS, cache = context.documents_BS, context.valid_BS, context.cache
    if cache is None:
        return Before(
            F.pad(value_BSD, (0, 0, reach, 0)),
            None if documents_BS is None else F.pad(documents_BS, (reach, 0), value=-1),
            None if valid_BS is None else F.pad(valid_BS, (reach, 0), value=False),
        )
    stored_BRD, own_BR = cache.latest(reach, value_BSD)
    cache.append((value_BSD,), context.positions_BS, documents_BS)
    # New tokens that hold nobody stand behind the others, where no token looks.
    return Before(
        torch.cat([stored_BRD, value_BSD], dim=1),
        None if documents_BS is None else torch.cat([own_BR, documents_BS], dim=1),
        None,
    )
