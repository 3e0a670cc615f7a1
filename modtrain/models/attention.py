"""Causal self-attention with rotary positions, grouped queries and an optional sliding window.

Shapes: B batch, S sequence, D model, H heads, G heads of keys and values, W width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modtrain.models.config import ModelConfig
from modtrain.models.norm import RMSNorm


class SequenceContext(NamedTuple):
    """What a sequence module has to know of its tokens beside their features.

    positions_BS: where each token stands in the text; B may be 1 where all sequences agree.
    cos_BSW, sin_BSW: the rotary factors of those positions, W here being half a head.
    """

    positions_BS: Tensor
    cos_BSW: Tensor
    sin_BSW: Tensor

    def gather(self, index_BK: Tensor) -> SequenceContext:
        """Return the context of the tokens ``index_BK`` alone; they keep their positions."""
        batch = index_BK.shape[0]

        def take(table_BSW: Tensor) -> Tensor:
            if table_BSW.shape[0] == 1:
                return table_BSW[0][index_BK]
            index = index_BK.unsqueeze(-1).expand(-1, -1, table_BSW.shape[-1])
            return table_BSW.gather(1, index)

        positions = self.positions_BS.expand(batch, -1).gather(1, index_BK)
        return SequenceContext(positions, take(self.cos_BSW), take(self.sin_BSW))


def rotary_context(positions_BS: Tensor, head_width: int, theta: float) -> SequenceContext:
    """Make the context of tokens at ``positions_BS`` (RoPE, arXiv 2104.09864)."""
    device = positions_BS.device
    exponent_W = torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width
    angle_BSW = positions_BS.unsqueeze(-1).float() * theta**-exponent_W
    return SequenceContext(positions_BS, angle_BSW.cos(), angle_BSW.sin())


def rotate(x_BSHW: Tensor, context: SequenceContext) -> Tensor:
    """Turn each pair (i, i + W/2) of a head by its token's angle, as Llama's checkpoints do."""
    cos = context.cos_BSW.unsqueeze(2).to(x_BSHW.dtype)
    sin = context.sin_BSW.unsqueeze(2).to(x_BSHW.dtype)
    left, right = x_BSHW.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Attention(nn.Module):
    """Self-attention among the tokens given, each seeing itself and those before it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.kv_heads = config.num_heads, config.kv_heads
        self.head_width, self.window = config.head_width, config.sliding_window
        query_dim, kv_dim = self.num_heads * self.head_width, self.kv_heads * self.head_width
        self.q = nn.Linear(config.d_model, query_dim, bias=False)
        self.k = nn.Linear(config.d_model, kv_dim, bias=False)
        self.v = nn.Linear(config.d_model, kv_dim, bias=False)
        self.out = nn.Linear(query_dim, config.d_model, bias=False)
        self.q_norm = RMSNorm(self.head_width, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_width, config.norm_eps) if config.qk_norm else None

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Tensor:
        """Return the update (B, S, D). The tokens come in the order of their positions."""
        batch, length, _ = x_BSD.shape
        q = self.q(x_BSD).view(batch, length, self.num_heads, self.head_width)
        k = self.k(x_BSD).view(batch, length, self.kv_heads, self.head_width)
        v = self.v(x_BSD).view(batch, length, self.kv_heads, self.head_width)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, context), rotate(k, context)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=self._window_mask(context),
            is_causal=self.window is None,
            enable_gqa=self.kv_heads != self.num_heads,
        )
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out

    def _window_mask(self, context: SequenceContext) -> Tensor | None:
        """Who sees whom (B, 1, S, S) under a sliding window, measured in true positions."""
        if self.window is None:
            return None
        # The order among equal positions (padding) is kept by the lower triangle.
        length = context.positions_BS.shape[1]
        lower = torch.ones(
            length, length, dtype=torch.bool, device=context.positions_BS.device
        ).tril()
        distance = context.positions_BS.unsqueeze(2) - context.positions_BS.unsqueeze(1)
        return (lower & (distance < self.window)).unsqueeze(1)
