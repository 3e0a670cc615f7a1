"""A gated causal depthwise convolution in attention's place.

Shapes: B batch, S sequence, D model, W width of the convolution.
"""

from __future__ import annotations

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
        taps_WD = self.taps.to(value_BSD.dtype)
        mixed_BSD = value_BSD * taps_WD[0]
        for back in range(1, min(len(taps_WD), x_BSD.shape[1])):
            before_BSD = F.pad(value_BSD, (0, 0, back, 0))[:, : x_BSD.shape[1]]
            sees_BS1 = self._sees(context, back)
            if sees_BS1 is not None:
                before_BSD = before_BSD.where(sees_BS1, 0)
            mixed_BSD = mixed_BSD + before_BSD * taps_WD[back]
        out: Tensor = self.out(F.silu(self.gate(x_BSD)) * mixed_BSD)
        return out

    @staticmethod
    def _sees(context: SequenceContext, back: int) -> Tensor | None:
        """Whether each token (B, S, 1) may see the one ``back`` places before it; None: all may."""
        sees = None
        if context.documents_BS is not None:
            other = F.pad(context.documents_BS, (back, 0), value=-1)[:, :-back]
            sees = other == context.documents_BS
        if context.valid_BS is not None:
            other = F.pad(context.valid_BS, (back, 0), value=False)[:, :-back]
            sees = other if sees is None else sees & other
        return None if sees is None else sees.unsqueeze(-1)
