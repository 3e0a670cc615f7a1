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
    """Rotate each pair (i, i + W/2) of a head by its token's angle, the layout of Llama."""
    cos = context.cos_BSW.unsqueeze(2).to(x_BSHW.dtype)
    sin = context.sin_BSW.unsqueeze(2).to(x_BSHW.dtype)
    left, right = x_BSHW.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Attention(nn.Module):
    """Pre-norm causal self-attention among the given tokens.

    returns_received: also return the attention that each token received, for the next router.
    """

    def __init__(self, config: ModelConfig, returns_received: bool = False) -> None:
        super().__init__()
        self.head_width, self.returns_received = config.head_width, returns_received
        query_dim, kv_dim = (
            heads * self.head_width for heads in (config.num_heads, config.kv_heads)
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.q = nn.Linear(config.d_model, query_dim, bias=config.qkv_bias)
        self.k = nn.Linear(config.d_model, kv_dim, bias=config.qkv_bias)
        self.v = nn.Linear(config.d_model, kv_dim, bias=config.qkv_bias)
        self.out = nn.Linear(query_dim, config.d_model, bias=False)
        self.q_norm = RMSNorm(self.head_width, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_width, config.norm_eps) if config.qk_norm else None

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Tensor | Output:
        """Return the update (B, S, D). The tokens come in the order of their positions."""
        batch, length, _ = x_BSD.shape
        x_BSD = self.norm(x_BSD)
        # All heads, or the local ones under tensor parallelism.
        q = self.q(x_BSD).view(batch, length, -1, self.head_width)
        if self.q_norm is not None:
            q = self.q_norm(q)
        q = rotate(q, context)
        k, v = context.keys_values or self._project_keys_values(x_BSD, context)
        out: Tensor = self.out(self.mix(q, k, v, context).reshape(batch, length, -1))
        if not self.returns_received or context.selection not in TRAINING_SELECTIONS:
            return out
        q, k = q.detach().transpose(1, 2), k.detach().transpose(1, 2)
        return Output(
            out, received_BS=received_attention(q, k, context.attention_mask_BSS, context.valid_BS)
        )

    def keys_values(self, x_BSD: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, S, G, W) of tokens that may be no queries; store them.

        x_BSD: the residual stream. A cache takes them here, and `mix` with them adds none.
        """
        k, v = self._project_keys_values(self.norm(x_BSD), context)
        if context.cache is not None:
            context.cache.append((k, v), context.positions_BS, context.documents_BS)
        return k, v

    def _project_keys_values(
        self, normed_BSD: Tensor, context: SequenceContext
    ) -> tuple[Tensor, Tensor]:
        batch, length, _ = normed_BSD.shape
        k = self.k(normed_BSD).view(batch, length, -1, self.head_width)
        v = self.v(normed_BSD).view(batch, length, -1, self.head_width)
        if self.k_norm is not None:
            k = self.k_norm(k)
        return rotate(k, context), v

    def mix(
        self, q_BSHW: Tensor, k_BSGW: Tensor, v_BSGW: Tensor, context: SequenceContext
    ) -> Tensor:
        """Return each query's attention output (B, S, H, W); context parallelism overrides it."""
        if context.cache is not None:
            return attend_with_cache(context.cache, q_BSHW, k_BSGW, v_BSGW, context)
        mask = context.attention_mask_BSS
        return attend(q_BSHW, k_BSGW, v_BSGW, mask, is_causal=mask is None)


def attend(
    q_BSHW: Tensor, k_BLGW: Tensor, v_BLGW: Tensor, mask_BSL: Tensor | None, is_causal: bool
) -> Tensor:
    """Return the attention output (B, S, H, W); ``mask_BSL``: True where a query sees a key."""
    out_BHSW = F.scaled_dot_product_attention(
        q_BSHW.transpose(1, 2),
        k_BLGW.transpose(1, 2),
        v_BLGW.transpose(1, 2),
        attn_mask=None if mask_BSL is None else mask_BSL.unsqueeze(1),
        is_causal=is_causal,
        enable_gqa=q_BSHW.shape[2] != k_BLGW.shape[2],
    )
    return out_BHSW.transpose(1, 2)


def attend_with_cache(
    cache: CacheView, q_NKHW: Tensor, k_NKGW: Tensor, v_NKGW: Tensor, context: SequenceContext
) -> Tensor:
    """Store new keys and values, and attend to all stored ones: (N, K, H, W)."""
    is_plain = context.window is None and context.documents_BS is None
    is_first = not any(cache.lengths)
    if context.keys_values is None:
        cache.append((k_NKGW, v_NKGW), context.positions_BS, context.documents_BS)
    # A batch of padding only: the result is not used.
    if is_first and (is_plain or not any(cache.counts)):
        return attend(q_NKHW, k_NKGW, v_NKGW, None, is_causal=True)
    if q_NKHW.device.type != "cpu" or len(cache.rows) == 1 or cache.store.is_all_rows(cache.rows):
        return _attend_to_cache(cache, q_NKHW, context)
    # One sequence at a time: a CPU gains nothing from a batch, and gathering rows would copy them.
    outputs = []
    for number, count in enumerate(cache.counts):
        row = slice(number, number + 1)
        documents = context.documents_BS
        row_context = context._replace(
            positions_BS=context.positions_BS[row],
            documents_BS=None if documents is None else documents[row],
        )
        row_cache = cache.select_rows([number], [count])
        outputs.append(_attend_to_cache(row_cache, q_NKHW[row], row_context))
    return torch.cat(outputs)


def _attend_to_cache(cache: CacheView, q_NKHW: Tensor, context: SequenceContext) -> Tensor:
    k_NLGW, v_NLGW = cache.store.fields(cache.rows)
    return attend(q_NKHW, k_NLGW, v_NLGW, _cache_mask(context, cache), is_causal=False)


def _cache_mask(context: SequenceContext, cache: CacheView) -> Tensor | None:
    """Return which entries (last dim) each new token attends to (N, K, L); None: all."""
    query_NK1, lengths = context.positions_BS.unsqueeze(2), cache.lengths
    longest = max([1, *lengths])
    conditions = []
    if min(lengths) < longest:
        device = query_NK1.device
        length_N11 = torch.tensor(lengths, device=device).view(-1, 1, 1)
        conditions.append(torch.arange(longest, device=device) < length_N11)
    num_new = query_NK1.shape[1] if context.keys_values is None else context.keys_values[0].shape[1]
    if num_new > 1 or context.window is not None:
        distance_NKL = query_NK1 - cache.store.positions(cache.rows).unsqueeze(1)
        conditions.append(distance_NKL >= 0)
        if context.window is not None:
            conditions.append(distance_NKL < context.window)
    if context.documents_BS is not None:
        documents_NL = cache.store.documents(cache.rows)
        conditions.append(context.documents_BS.unsqueeze(2) == documents_NL.unsqueeze(1))
    return functools.reduce(operator.and_, conditions) if conditions else None


def received_attention(
    q_BHSW: Tensor, k_BGSW: Tensor, mask_BSS: Tensor | None, valid_BS: Tensor | None
) -> Tensor:
    """Return the attention (B, S) that each token receives: a mean over heads and queries.

    The mean is over the valid queries that see the token; otherwise early tokens, which more
    queries see, would always score highest. It is the causal form of A-MoD's signal (arXiv
    2412.20875, section 3.2). It depends on later tokens, so only training can select by it.
    """
    _, heads, length, width = q_BHSW.shape
    if mask_BSS is None:
        ones_SS = torch.ones(length, length, dtype=torch.bool, device=q_BHSW.device)
        mask_BSS = ones_SS.tril()[None]
    counted_BSS = mask_BSS if valid_BS is None else mask_BSS & valid_BS.unsqueeze(2)
    group = heads // k_BGSW.shape[1]
    wide = torch.promote_types(q_BHSW.dtype, torch.float32)
    total_BS = torch.zeros((), dtype=wide, device=q_BHSW.device)
    with torch.autocast(q_BHSW.device.type, enabled=False):
        # Head by head: the scores of all heads together would be the model's largest tensor.
        for head in range(heads):
            key_BSW = k_BGSW[:, head // group].to(wide)
            score_BSS = q_BHSW[:, head].to(wide) @ key_BSW.mT / math.sqrt(width)
            weight_BSS = score_BSS.masked_fill(~mask_BSS, float("-inf")).softmax(dim=-1)
            total_BS = total_BS + weight_BSS.where(counted_BSS, 0).sum(dim=1)
    return total_BS / (heads * counted_BSS.sum(dim=1).clamp(min=1))
