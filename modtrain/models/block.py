"""A transformer block, written as the update it would add to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from modtrain.models.attention import Attention, SequenceContext
from modtrain.models.config import ModelConfig
from modtrain.models.feed_forward import FeedForward
from modtrain.models.norm import RMSNorm


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm MLP.

    Like every sequence module here it returns its update f(x), not x + f(x): whoever calls it adds
    the residual, so that a router can weigh the update alone and no residual is added twice.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Tensor:
        """Return the update (B, S, D) of both parts together."""
        attended = self.attention(self.attention_norm(x_BSD), context)
        out: Tensor = attended + self.mlp(self.mlp_norm(x_BSD + attended))
        return out
