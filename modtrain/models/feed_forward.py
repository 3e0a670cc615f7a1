"""The MLP of a block: SwiGLU (arXiv 2002.05202) or GELU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from modtrain.models.config import ModelConfig
from modtrain.models.norm import RMSNorm
from modtrain.models.sequence import SequenceContext


class MLP(nn.Module):
    """A position-wise MLP with one hidden layer."""

    def __init__(self, d_model: int, width: int, activation: str) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, width, bias=False)
        self.gate = nn.Linear(d_model, width, bias=False) if activation == "swiglu" else None
        self.down = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, D) to (…, D)."""
        up = self.up(x)
        hidden = F.gelu(up) if self.gate is None else F.silu(self.gate(x)) * up
        out: Tensor = self.down(hidden)
        return out


class FeedForward(nn.Module):
    """A block's pre-norm MLP as a sequence module."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.inner = MLP(config.d_model, config.ff_width, config.activation)

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Tensor:
        """Return the update (B, S, D); tokens do not interact."""
        del context
        out: Tensor = self.inner(self.norm(x_BSD))
        return out
