"""Causal self-attention with rotary positions, grouped queries and an optional sliding window.

Shapes: B batch, S sequence, D model, H heads, G heads of keys and values, W width of a head; with
a cache N sequences, K new tokens, L entries.
"""

from __future__ import annotations

import functools
import math
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modtrain.models.cache.cache import CacheView
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import TRAINING_SELECTIONS
from modtrain.models.norm import RMSNorm
from modtrain.models.sequence import Output, SequenceContext


def rotate(x_BSHW: Tensor, context: SequenceContext) -> Tensor:
    """Turn each pair (i, i + W/2) of a head by its token's angle, as Llama's checkpoints do."""
    cos = context.cos_BSW.unsqueeze(2).to(x_BSHW.dtype)
    sin = context.sin_BSW.unsqueeze(2).to(x_BSHW.dtype)
    left, right = x_BSHW.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Attention(nn.Module):
    """Pre-norm self-attention among the tokens given, each seeing itself and those before it.

    tells_received: also say how much attention each token received, for a router behind.
    """

    def __init__(self, config: ModelConfig, tells_received: bool = False) -> None:
        super().__init__()
        self.head_width, self.tells_received = config.head_width, tells_received
        query_dim, kv_dim = (
            heads * self.head_width for heads in (config.num_heads, config.kv_heads)
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.q = nn.Linear(config.d_model, query_dim, bias=False)
        self.k = nn.Linear(config.d_model, kv_dim, bias=False)
        self.v = nn.Linear(config.d_model, kv_dim, bias=False)
        self.out = nn.Linear(query_dim, config.d_model, bias=False)
        self.q_norm = RMSNorm(self.head_width, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_width, config.norm_eps) if config.qk_norm else None

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Tensor | Output:
        """Return the update (B, S, D). The tokens come in the order of their positions."""
        batch, length, _ = x_BSD.shape
        x_BSD = self.norm(x_BSD)
        # Of all heads, or of those that this process has.
        q = self.q(x_BSD).view(batch, length, -1, self.head_width)
        k = self.k(x_BSD).view(batch, length, -1, self.head_width)
        v = self.v(x_BSD).view(batch, length, -1, self.head_width)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, context), rotate(k, context)
        out: Tensor = self.out(self.mix(q, k, v, context).reshape(batch, length, -1))
        if not self.tells_received or context.selection not in TRAINING_SELECTIONS:
            return out
        q, k = q.detach().transpose(1, 2), k.detach().transpose(1, 2)
        return Output(out, received_BS=received(q, k, context.visible_BSS, context.valid_BS))

    def mix(
        self, q_BSHW: Tensor, k_BSGW: Tensor, v_BSGW: Tensor, context: SequenceContext
    ) -> Tensor:
        """Return what each query attends to (B, S, H, W).

        A method, so that ranks that have shares of a sequence can gather its keys and values.
        """
        if context.cache is not None:
            return attend_through(context.cache, q_BSHW, k_BSGW, v_BSGW, context)
        sees = context.visible_BSS
        return attend(q_BSHW, k_BSGW, v_BSGW, sees, is_causal=sees is None)


def attend(
    q_BSHW: Tensor, k_BLGW: Tensor, v_BLGW: Tensor, sees_BSL: Tensor | None, is_causal: bool
) -> Tensor:
    """Return what each query attends to (B, S, H, W); ``sees_BSL`` None: all, or as is causal."""
    mixed = F.scaled_dot_product_attention(
        q_BSHW.transpose(1, 2),
        k_BLGW.transpose(1, 2),
        v_BLGW.transpose(1, 2),
        attn_mask=None if sees_BSL is None else sees_BSL.unsqueeze(1),
        is_causal=is_causal,
        enable_gqa=q_BSHW.shape[2] != k_BLGW.shape[2],
    )
    return mixed.transpose(1, 2)


def attend_through(
    cache: CacheView, q_NKHW: Tensor, k_NKGW: Tensor, v_NKGW: Tensor, context: SequenceContext
) -> Tensor:
    """Store new keys and values, and attend to all that there are: (N, K, H, W)."""
    is_plain = context.window is None and context.documents_BS is None
    is_first = cache.is_empty()
    cache.append((k_NKGW, v_NKGW), context.positions_BS, context.documents_BS)
    # Padding alone is nowhere looked at.
    if is_first and (is_plain or not any(cache.counts)):
        return attend(q_NKHW, k_NKGW, v_NKGW, None, is_causal=True)
    if q_NKHW.device.type != "cpu" or cache.is_whole():
        return _recall(cache, q_NKHW, context)
    # A CPU gains nothing from a batch here, and rows that do not lie together would be copied.
    mixed = []
    for number, count in enumerate(cache.counts):
        own = slice(number, number + 1)
        documents = context.documents_BS
        alone = context._replace(
            positions_BS=context.positions_BS[own],
            documents_BS=None if documents is None else documents[own],
        )
        mixed.append(_recall(cache.of([number], [count]), q_NKHW[own], alone))
    return torch.cat(mixed)


def _recall(cache: CacheView, q_NKHW: Tensor, context: SequenceContext) -> Tensor:
    entries = cache.entries()
    k_NLGW, v_NLGW = entries.fields
    sees_NKL = _sees_entries(context, cache, entries.lengths)
    return attend(q_NKHW, k_NLGW, v_NLGW, sees_NKL, is_causal=False)


def _sees_entries(context: SequenceContext, cache: CacheView, lengths: list[int]) -> Tensor | None:
    """Which entry (last) each new token sees (N, K, L); None: all of them."""
    query_NK1, longest = context.positions_BS.unsqueeze(2), max([1, *lengths])
    conditions = []
    if min(lengths) < longest:
        device = query_NK1.device
        length_N11 = torch.tensor(lengths, device=device).view(-1, 1, 1)
        conditions.append(torch.arange(longest, device=device) < length_N11)
    if query_NK1.shape[1] > 1 or context.window is not None:
        back_NKL = query_NK1 - cache.positions().unsqueeze(1)
        conditions.append(back_NKL >= 0)
        if context.window is not None:
            conditions.append(back_NKL < context.window)
    if context.documents_BS is not None:
        conditions.append(context.documents_BS.unsqueeze(2) == cache.documents().unsqueeze(1))
    return functools.reduce(operator.and_, conditions) if conditions else None


def received(
    q_BHSW: Tensor, k_BGSW: Tensor, visible_BSS: Tensor | None, valid_BS: Tensor | None
) -> Tensor:
    """Return the attention (B, S) that each token receives: a mean over heads and queries.

    The mean goes over the valid queries that see the token, or else early tokens, which more
    queries see, would always win. Of A-MoD's signal (arXiv 2412.20875, section 3.2) this is the
    causal form. It is made of what later tokens attend to, so it is for training's choice alone.
    """
    _, heads, length, width = q_BHSW.shape
    if visible_BSS is None:
        visible_BSS = torch.ones(length, length, dtype=torch.bool, device=q_BHSW.device).tril()[
            None
        ]
    asks_BSS = visible_BSS if valid_BS is None else visible_BSS & valid_BS.unsqueeze(2)
    group = heads // k_BGSW.shape[1]
    wide = torch.promote_types(q_BHSW.dtype, torch.float32)
    total_BS = torch.zeros((), dtype=wide, device=q_BHSW.device)
    with torch.autocast(q_BHSW.device.type, enabled=False):
        # Head by head: the scores of all heads at once would be the largest tensor of the model.
        for head in range(heads):
            key_BSW = k_BGSW[:, head // group].to(wide)
            score_BSS = q_BHSW[:, head].to(wide) @ key_BSW.mT / math.sqrt(width)
            weight_BSS = score_BSS.masked_fill(~visible_BSS, float("-inf")).softmax(dim=-1)
            total_BS = total_BS + weight_BSS.where(asks_BSS, 0).sum(dim=1)
    return total_BS / (heads * asks_BSS.sum(dim=1).clamp(min=1))
