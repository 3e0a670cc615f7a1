"""The MLP of a block: SwiGLU (arXiv 2002.05202) or GELU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from modtrain.models.config import ModelConfig


class FeedForward(nn.Module):
    """Each token by itself through a wider hidden layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.ff_width, bias=False)
        gated = config.activation == "swiglu"
        self.gate = nn.Linear(config.d_model, config.ff_width, bias=False) if gated else None
        self.down = nn.Linear(config.ff_width, config.d_model, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return the update (B, S, D)."""
        up = self.up(x_BSD)
        hidden = F.gelu(up) if self.gate is None else F.silu(self.gate(x_BSD)) * up
        out: Tensor = self.down(hidden)
        return out
