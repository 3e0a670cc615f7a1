"""Mixture-of-Depths language models (arXiv 2404.02258), deciding causally.

A token that a router does not choose passes by on the residual stream: it is not computed there,
and leaves nothing in the cache, or with ``keep_kv`` its key and value alone. A decision depends on
the token alone, so it is the same for a whole text and for one token after the other. Padding
enters no layer.

Shapes: B batch, S tokens of this call, T with those before it, N tokens of all sequences that enter
a part, K the most of one sequence, L entries of a cache, D model, H heads, G heads of keys and
values, W width of a head, E experts, R experts and no-ops.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_modtrain import ModtrainConfig


def widen(x: Tensor) -> Tensor:
    """Return ``x`` in float32 or wider: in bfloat16 scores would often tie."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Tokens(NamedTuple):
    """The tokens that enter a part of the model, sequence by sequence, in order.

    row_N, index_N: their sequence, and where they are among the tokens of this call.
    slot_N: their number among those of their sequence. column_N: their place in the whole text.
    cos_NW, sin_NW: of their positions' angles. shape: B and K.
    """

    row_N: Tensor
    index_N: Tensor
    slot_N: Tensor
    column_N: Tensor
    cos_NW: Tensor
    sin_NW: Tensor
    shape: tuple[int, int]

    @property
    def is_ragged(self) -> bool:
        """Whether a sequence has fewer tokens than another one."""
        return len(self.row_N) < self.shape[0] * self.shape[1]

    def gather(self, x_BS: Tensor) -> Tensor:
        """Return the values (N, …) of these tokens."""
        return x_BS[self.row_N, self.index_N]

    def pad(self, x_N: Tensor, value: int = 0) -> Tensor:
        """Return (N, …) as (B, K, …): each sequence's tokens first, ``value`` behind them."""
        padded = x_N.new_full((*self.shape, *x_N.shape[1:]), value)
        padded[self.row_N, self.slot_N] = x_N
        return padded

    def unpad(self, x_BK: Tensor) -> Tensor:
        """Return (B, K, …) as (N, …)."""
        return x_BK[self.row_N, self.slot_N]

    def columns(self) -> Tensor:
        """Return the tokens' places in the text (B, K), -1 for none."""
        return self.pad(self.column_N, -1)


def select_tokens(chosen_BS: Tensor, cos_BSW: Tensor, sin_BSW: Tensor, seen: int) -> Tokens:
    """Return the chosen tokens of a call that ``seen`` tokens precede."""
    row_N, index_N = chosen_BS.nonzero(as_tuple=True)
    slot_N = chosen_BS.long().cumsum(dim=1)[row_N, index_N] - 1
    num_slots = int(slot_N.max()) + 1 if len(slot_N) else 0
    return Tokens(
        row_N,
        index_N,
        slot_N,
        index_N + seen,
        cos_BSW[row_N, index_N],
        sin_BSW[row_N, index_N],
        (len(chosen_BS), num_slots),
    )


class ModtrainLayerCache:
    """What a layer's attention or convolution keeps of the tokens that entered it.

    states: tensors (B, L, …), each sequence's entries first and in order. column_BL: the place in
    the text of each entry, -1 for none.

    Entries that no later token reads are dropped when the next tokens come, or by `crop`; so those
    of one call can be taken back. record_past: only by `crop`.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, window: int | None = None, last: int | None = None) -> None:
        """Make an empty cache.

        window: how many positions back a token reads; None: all. last: how many entries back.
        """
        self.window, self.last = window, last
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.states: tuple[Tensor, ...] = ()
        self.column_BL: Tensor | None = None
        self.first = 0

    def append(
        self, states: tuple[Tensor, ...], column_BK: Tensor, seen: int
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Add new tokens, and return all entries; ``seen`` tokens of the text precede this call."""
        if not self.record_past:
            self._drop_unread(seen)
        if self.column_BL is not None:
            states = tuple(
                torch.cat([old, new], dim=1) for old, new in zip(self.states, states, strict=True)
            )
            column_BK = torch.cat([self.column_BL, column_BK], dim=1)
        self.states, self.column_BL = states, column_BK
        self._keep(column_BK >= 0)
        return self.states, self.column_BL

    def newest(self, count: int, like_BKD: Tensor) -> Tensor:
        """Return the newest ``count`` entries of a single state (B, count, D), zeros in front."""
        if self.column_BL is None:
            return like_BKD.new_zeros(len(like_BKD), count, like_BKD.shape[-1])
        length_B1 = (self.column_BL >= 0).sum(dim=1, keepdim=True)
        index_BC = length_B1 - count + torch.arange(count, device=length_B1.device)
        row_B1 = torch.arange(len(index_BC), device=index_BC.device).unsqueeze(1)
        value_BCD = F.pad(self.states[0], (0, 0, 0, 1))[row_B1, index_BC.clamp(min=0)]
        return value_BCD.masked_fill((index_BC < 0).unsqueeze(-1), 0)

    def crop(self, length: int) -> None:
        """Take back all but the text's first ``length`` tokens.

        Raises:
            ValueError: entries that were dropped would be read again.
        """
        if length < self.first:
            raise ValueError(f"the cache can be cropped to {self.first} tokens, not to {length}")
        if self.column_BL is not None:
            self._keep((self.column_BL >= 0) & (self.column_BL < length))
            self._drop_unread(length)

    def select(self, row_N: Tensor) -> None:
        """Replace the sequences by those of these numbers."""
        if self.column_BL is not None:
            row_N = row_N.to(self.column_BL.device)
            self.states = tuple(state.index_select(0, row_N) for state in self.states)
            self.column_BL = self.column_BL.index_select(0, row_N)

    def _drop_unread(self, length: int) -> None:
        """Drop what no token from the place ``length`` on reads."""
        if self.column_BL is None or (self.window is None and self.last is None):
            return
        is_read_BL = is_entry_BL = self.column_BL >= 0
        if self.window is not None:
            is_read_BL = is_entry_BL & (self.column_BL > length - self.window)
        elif self.last is not None:
            num_later_BL = is_entry_BL.flip(1).long().cumsum(dim=1).flip(1)
            is_read_BL = is_entry_BL & (num_later_BL <= self.last)
        if bool((is_entry_BL & ~is_read_BL).any()):
            self.first = length
            self._keep(is_read_BL)

    def _keep(self, kept_BL: Tensor) -> None:
        """Drop all other entries, and move each sequence's to the front."""
        if self.column_BL is None or bool(kept_BL.all()):
            return
        count = int(kept_BL.sum(dim=1).max())
        index_BL = (~kept_BL).byte().argsort(dim=1, stable=True)[:, :count]
        row_B1 = torch.arange(len(index_BL), device=index_BL.device).unsqueeze(1)
        self.states = tuple(state[row_B1, index_BL] for state in self.states)
        self.column_BL = self.column_BL.masked_fill(~kept_BL, -1)[row_B1, index_BL]


class ModtrainCache(Cache):
    """The cache of a model: in a routed layer of the tokens that entered it, and of no others.

    With ``keep_kv`` attention has those of all tokens.
    """

    def __init__(self, config: ModtrainConfig) -> None:
        """Make an empty cache for a model of this configuration."""
        layers: Any = [
            ModtrainLayerCache(last=config.conv_width - 1)
            if mixer == "convolution"
            else ModtrainLayerCache(config.sliding_window)
            for mixer in config.layer_mixers or []
        ]
        super().__init__(layers=layers)
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens that the model has seen, whatever layers they entered."""
        del layer_idx
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no maximum."""
        del layer_idx
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the length and the offset of a mask for this many new tokens."""
        del layer_idx
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest ``-tokens_to_remove`` tokens; a positive number of them is kept."""
        is_length = tokens_to_remove > 0
        self.seen = min(self.seen, tokens_to_remove if is_length else self.seen + tokens_to_remove)
        for layer in self.layers:
            layer.crop(self.seen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each beam the sequence that it continues."""
        for layer in self.layers:
            layer.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these sequences."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        for layer in self.layers:
            if layer.column_BL is not None:
                count, device = len(layer.column_BL), layer.column_BL.device
                layer.select(torch.arange(count, device=device).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Drop what is not read any more only by `crop`, as a model that drafts needs it."""
        for layer in self.layers:
            layer.record_past = True


class ModtrainRMSNorm(nn.Module):
    """Scale each vector to root mean square 1, times a weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class ModtrainTokenMLP(nn.Module):
    """Two layers from a token, scaled to root mean square 1, to one number."""

    def __init__(self, hidden_size: int, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.hidden = nn.Linear(hidden_size, width)
        self.out = nn.Linear(width, 1)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return one number per token (B, S)."""
        x_BSD = x_BSD.to(self.out.weight.dtype)
        x_BSD = F.rms_norm(x_BSD, (x_BSD.shape[-1],), eps=self.eps)
        out_BS: Tensor = self.out(F.gelu(self.hidden(x_BSD))).squeeze(-1)
        return widen(out_BS)


def hash_positions(position_BS: Tensor, salt: int) -> Tensor:
    """Return a hash of each position, evenly distributed in [0, 2^32)."""
    hashed = (position_BS + (salt + 1) * 0x9E3779B1) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        hashed = ((hashed ^ (hashed >> shift)) * factor) & 0xFFFFFFFF
    return hashed ^ (hashed >> 16)


class ModtrainRouter(nn.Module):
    """Decides from a token alone whether it enters a part, and by what its update is multiplied."""

    threshold: Tensor

    def __init__(self, config: ModtrainConfig, capacity: float, number: int) -> None:
        """Make the router of this ``number`` in the model."""
        super().__init__()
        self.config, self.capacity, self.number = config, capacity, number
        size, eps, decisions = config.hidden_size, config.rms_norm_eps, config.decisions or []
        if config.router_score == "linear":
            self.weight = nn.Parameter(torch.empty(size))
        elif config.router_score == "mlp":
            self.scorer = ModtrainTokenMLP(size, config.router_hidden_size, eps)
        if "predictor" in decisions:
            self.predictor = ModtrainTokenMLP(size, config.predictor_hidden_size, eps)
        if "threshold" in decisions:
            self.register_buffer("threshold", torch.zeros(()))
        if config.gate_scale:
            self.gate_scale = nn.Parameter(torch.ones(1))

    def forward(self, x_BSD: Tensor, position_BS: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return which tokens enter (B, S), and the factors on their updates (B, S); None: 1."""
        score_BS = self.score(x_BSD, position_BS)
        decision = self.config.decision
        if decision == "position":
            chosen_BS = self.choose_by_position(position_BS)
        elif decision == "predictor":
            chosen_BS = self.predictor(x_BSD) > 0
        elif decision == "auxiliary":
            chosen_BS = score_BS > 0
        else:
            chosen_BS = score_BS > self.threshold
        return chosen_BS, self.gate(score_BS, x_BSD)

    def score(self, x_BSD: Tensor, position_BS: Tensor) -> Tensor:
        """Return the tokens' scores (B, S)."""
        kind = self.config.router_score
        if kind == "linear":
            x_BSD = widen(x_BSD)
            if self.config.router_input_norm:
                x_BSD = F.rms_norm(x_BSD, (x_BSD.shape[-1],), eps=self.config.rms_norm_eps)
            return x_BSD @ widen(self.weight)
        if kind == "mlp":
            score_BS: Tensor = self.scorer(x_BSD)
            return score_BS
        if kind == "random":
            share_BS = (hash_positions(position_BS, self.number).float() + 0.5) / 2**32
            quantile_BS: Tensor = torch.special.ndtri(share_BS.clamp(max=1 - 1e-6))
            return -quantile_BS
        return widen(torch.ones_like(x_BSD[..., 0]))

    def choose_by_position(self, position_BS: Tensor) -> Tensor:
        """Return the share of the positions: pseudo-random, or evenly spaced."""
        if self.config.router_score == "random":
            return hash_positions(position_BS, self.number) < int(self.capacity * 2**32)
        share = Fraction(self.capacity).limit_denominator(10**6)
        taken_BS, before_BS = (
            count_BS * share.numerator // share.denominator
            for count_BS in (position_BS + 1, position_BS)
        )
        return taken_BS > before_BS

    def gate(self, score_BS: Tensor, x_BSD: Tensor) -> Tensor | None:
        """Return the factor on each token's update (B, S); None: 1."""
        config = self.config
        gate_BS: Tensor | None = None
        if config.gate == "raw":
            gate_BS = score_BS
        elif config.gate == "sigmoid":
            gate_BS = score_BS.sigmoid()
        elif config.gate == "tanh":
            if config.router_score == "linear" and not config.router_input_norm:
                # Such a score grows with the residual stream.
                mean_square_BS = widen(x_BSD).square().mean(dim=-1)
                score_BS = score_BS * torch.rsqrt(mean_square_BS + config.rms_norm_eps)
            gate_BS = score_BS.tanh()
        if gate_BS is not None:
            gate_BS = gate_BS * config.gate_multiplier + config.gate_offset
        if config.gate_scale:
            gate_BS = widen(self.gate_scale) * (1 if gate_BS is None else gate_BS)
            gate_BS = gate_BS.expand_as(score_BS)
        return gate_BS


class ModtrainAttention(nn.Module):
    """Causal attention among the tokens that enter, and those that entered before them."""

    def __init__(self, config: ModtrainConfig) -> None:
        super().__init__()
        self.head_dim, self.window = config.head_dim, config.sliding_window
        size, eps = config.hidden_size, config.rms_norm_eps
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, size, bias=False)
        self.q_norm = ModtrainRMSNorm(config.head_dim, eps) if config.qk_norm else None
        self.k_norm = ModtrainRMSNorm(config.head_dim, eps) if config.qk_norm else None

    def keys_values(
        self, x_ND: Tensor, tokens: Tokens, cache: ModtrainLayerCache | None, seen: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values (B, L, G, W) and places in the text (B, L), the cached ones too."""
        k_NGW, v_NGW = (
            projection(x_ND).unflatten(-1, (-1, self.head_dim))
            for projection in (self.k_proj, self.v_proj)
        )
        if self.k_norm is not None:
            k_NGW = self.k_norm(k_NGW)
        k, v = tokens.pad(rotate(k_NGW, tokens)), tokens.pad(v_NGW)
        column_BL = tokens.columns()
        if cache is not None:
            (k, v), column_BL = cache.append((k, v), column_BL, seen)
        return k, v, column_BL

    def forward(
        self,
        x_ND: Tensor,
        tokens: Tokens,
        cache: ModtrainLayerCache | None,
        seen: int,
        kept: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the update (N, D).

        kept: what `keys_values` returned of all tokens; None: keys and values are of these alone.
        """
        q_NHW = self.q_proj(x_ND).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None:
            q_NHW = self.q_norm(q_NHW)
        q = tokens.pad(rotate(q_NHW, tokens))
        k, v, key_column_BL = kept or self.keys_values(x_ND, tokens, cache, seen)
        column_BK = tokens.columns()
        # Without earlier tokens, all begin at the same place.
        is_plain = self.window is None and not tokens.is_ragged and k.shape[1] == q.shape[1]
        out_BHKW = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if is_plain else self.mask(column_BK, key_column_BL).unsqueeze(1),
            is_causal=is_plain,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        out_ND: Tensor = self.o_proj(tokens.unpad(out_BHKW.transpose(1, 2)).flatten(1))
        return out_ND

    def mask(self, column_BK: Tensor, key_column_BL: Tensor) -> Tensor:
        """Return which entries each token sees (B, K, L); a place without a token sees all."""
        column_BK1, key_column_B1L = column_BK.unsqueeze(2), key_column_BL.unsqueeze(1)
        mask_BKL = (key_column_B1L >= 0) & (key_column_B1L <= column_BK1)
        if self.window is not None:
            mask_BKL = mask_BKL & (column_BK1 - key_column_B1L < self.window)
        return mask_BKL | (column_BK1 < 0)


def rotate(x_NHW: Tensor, tokens: Tokens) -> Tensor:
    """Rotate each pair (i, i + W/2) of a head by its token's angle."""
    cos_N1W, sin_N1W = (x.unsqueeze(1).to(x_NHW.dtype) for x in (tokens.cos_NW, tokens.sin_NW))
    left, right = x_NHW.chunk(2, dim=-1)
    return torch.cat([left * cos_N1W - right * sin_N1W, right * cos_N1W + left * sin_N1W], dim=-1)


class ModtrainConvolution(nn.Module):
    """A gated depthwise convolution over the tokens that enter, and those that entered before."""

    def __init__(self, config: ModtrainConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.value_proj = nn.Linear(size, size, bias=False)
        self.gate_proj = nn.Linear(size, size, bias=False)
        self.taps = nn.Parameter(torch.empty(config.conv_width, size))
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(
        self, x_ND: Tensor, tokens: Tokens, cache: ModtrainLayerCache | None, seen: int
    ) -> Tensor:
        """Return the update (N, D)."""
        value_BKD = tokens.pad(self.value_proj(x_ND))
        num_before, length = len(self.taps) - 1, value_BKD.shape[1]
        before = ModtrainLayerCache() if cache is None else cache
        value_BTD = torch.cat([before.newest(num_before, value_BKD), value_BKD], dim=1)
        if cache is not None:
            cache.append((value_BKD,), tokens.columns(), seen)
        shifted = [
            value_BTD[:, num_before - back : num_before - back + length] * tap_D
            for back, tap_D in enumerate(self.taps)
        ]
        mixed_ND = tokens.unpad(torch.stack(shifted).sum(dim=0))
        out_ND: Tensor = self.o_proj(F.silu(self.gate_proj(x_ND)) * mixed_ND)
        return out_ND


class ModtrainMLP(nn.Module):
    """SwiGLU, or two matrices and a GELU."""

    def __init__(self, config: ModtrainConfig, width: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.up_proj = nn.Linear(size, width, bias=False)
        self.gate_proj = nn.Linear(size, width, bias=False) if config.gated_mlp else None
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, D) to (…, D)."""
        up = self.up_proj(x)
        hidden = F.gelu(up) if self.gate_proj is None else F.silu(self.gate_proj(x)) * up
        out: Tensor = self.down_proj(hidden)
        return out


class ModtrainExpertRouter(nn.Module):
    """Chooses the experts of each token, no-op experts among them, and their weights."""

    bias: Tensor
    quantile: Tensor

    def __init__(self, config: ModtrainConfig) -> None:
        super().__init__()
        self.config = config
        choices = config.num_experts + config.num_noop_experts
        self.weight = nn.Parameter(torch.empty(choices, config.hidden_size))
        if config.expert_bias:
            self.register_buffer("bias", torch.zeros(choices))
        if config.expert_choice == "expert":
            self.register_buffer("quantile", torch.zeros(config.num_experts))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of the computing experts take a token, and with what weight (N, E)."""
        config = self.config
        logits_NR = widen(x_ND) @ widen(self.weight).t()
        probability_NR = (logits_NR - logits_NR.logsumexp(-1, keepdim=True)).exp()
        if config.expert_choice == "expert":
            probability_NE = probability_NR[:, : config.num_experts]
            return probability_NE > self.quantile, probability_NE
        biased_NR = logits_NR + self.bias if config.expert_bias else logits_NR
        choice_NK = biased_NR.topk(config.num_experts_per_tok, dim=-1).indices
        weight_NK = logits_NR.gather(1, choice_NK).softmax(-1)
        if config.num_experts_per_tok == 1:
            weight_NK = probability_NR.gather(1, choice_NK)
        chosen_NR = torch.zeros_like(logits_NR, dtype=torch.bool).scatter(1, choice_NK, True)
        weight_NR = torch.zeros_like(logits_NR).scatter(1, choice_NK, weight_NK)
        return chosen_NR[:, : config.num_experts], weight_NR[:, : config.num_experts]


class ModtrainExperts(nn.Module):
    """A mixture of MLPs, shared ones beside it."""

    def __init__(self, config: ModtrainConfig) -> None:
        super().__init__()
        count, size, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.router = ModtrainExpertRouter(config)
        self.up_proj = nn.Parameter(torch.empty(count, size, width))
        self.gate_proj = nn.Parameter(torch.empty(count, size, width)) if config.gated_mlp else None
        self.down_proj = nn.Parameter(torch.empty(count, width, size))
        shared = config.num_shared_experts
        self.shared = ModtrainMLP(config, shared * width) if shared else None

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return the update (N, D)."""
        chosen_NE, weight_NE = self.router(x_ND)
        update_ND = torch.zeros_like(x_ND)
        for expert in chosen_NE.any(dim=0).nonzero().flatten().tolist():
            row_M = chosen_NE[:, expert].nonzero().flatten()
            x_MD = x_ND[row_M]
            up = x_MD @ self.up_proj[expert]
            gate = self.gate_proj
            hidden = F.gelu(up) if gate is None else F.silu(x_MD @ gate[expert]) * up
            weight_M1 = weight_NE[row_M, expert].unsqueeze(-1).to(x_ND.dtype)
            update_ND = update_ND.index_add(0, row_M, hidden @ self.down_proj[expert] * weight_M1)
        return update_ND if self.shared is None else update_ND + self.shared(x_ND)


Part = Callable[[Tensor, Tokens], Tensor]


class ModtrainDecoderLayer(nn.Module):
    """A block, or its parts, that all tokens enter or those that a router chooses."""

    def __init__(self, config: ModtrainConfig, index: int, first_router: int) -> None:
        """Make layer ``index``, whose routers have the numbers from ``first_router`` on."""
        super().__init__()
        capacity = (config.layer_capacities or [])[index]
        is_convolution = (config.layer_mixers or [])[index] == "convolution"
        has_experts = (config.layer_experts or [])[index]
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = ModtrainRMSNorm(size, eps)
        self.self_attn: ModtrainConvolution | ModtrainAttention = (
            ModtrainConvolution(config) if is_convolution else ModtrainAttention(config)
        )
        self.post_attention_layernorm = ModtrainRMSNorm(size, eps)
        self.mlp: nn.Module = (
            ModtrainExperts(config)
            if has_experts
            else ModtrainMLP(config, config.intermediate_size)
        )
        self.keeps_keys = capacity is not None and config.keep_kv
        self.part = "block" if capacity is None else config.routed_part
        self.router = self.attention_router = self.mlp_router = None
        if capacity is not None:
            if self.part == "block":
                self.router = ModtrainRouter(config, capacity, first_router)
            if self.part in ("attention", "both"):
                self.attention_router = ModtrainRouter(config, capacity, first_router)
            if self.part in ("mlp", "both"):
                number = first_router + (self.part == "both")
                self.mlp_router = ModtrainRouter(config, capacity, number)

    def forward(
        self,
        x_BSD: Tensor,
        position_BS: Tensor,
        valid_BS: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: ModtrainLayerCache | None,
        seen: int,
    ) -> Tensor:
        """Return the residual stream (B, S, D) after the layer."""
        # Keys and values of those that enter, or of all.
        kept: tuple[Any, ...] = ()
        if self.keeps_keys and isinstance(self.self_attn, ModtrainAttention):
            everyone = select_tokens(valid_BS, *angles, seen)
            normed_ND = self.input_layernorm(everyone.gather(x_BSD))
            kept = (self.self_attn.keys_values(normed_ND, everyone, cache, seen),)

        def attend(x_ND: Tensor, tokens: Tokens) -> Tensor:
            out_ND: Tensor = self.self_attn(self.input_layernorm(x_ND), tokens, cache, seen, *kept)
            return out_ND

        def feed(x_ND: Tensor, tokens: Tokens) -> Tensor:
            del tokens
            out_ND: Tensor = self.mlp(self.post_attention_layernorm(x_ND))
            return out_ND

        def block(x_ND: Tensor, tokens: Tokens) -> Tensor:
            attended_ND = attend(x_ND, tokens)
            return attended_ND + feed(x_ND + attended_ND, tokens)

        def route(x_BSD: Tensor, part: Part, router: ModtrainRouter | None) -> Tensor:
            """x_i + g_i f(X)_i for the tokens X that enter the part, x_i for the others."""
            chosen_BS, gate_BS = valid_BS, None
            if router is not None:
                chosen_BS, gate_BS = router(x_BSD, position_BS)
                chosen_BS = chosen_BS & valid_BS
            tokens = select_tokens(chosen_BS, *angles, seen)
            if not len(tokens.row_N):
                return x_BSD
            x_ND = tokens.gather(x_BSD)
            update_ND = part(x_ND, tokens)
            if gate_BS is not None:
                update_ND = update_ND * tokens.gather(gate_BS).unsqueeze(-1)
            x_ND = x_ND + update_ND.to(x_ND.dtype)
            return x_BSD.index_put((tokens.row_N, tokens.index_N), x_ND)

        if self.part == "block":
            return route(x_BSD, block, self.router)
        return route(route(x_BSD, attend, self.attention_router), feed, self.mlp_router)


class ModtrainPreTrainedModel(PreTrainedModel):
    """What the models share."""

    config: ModtrainConfig
    config_class = ModtrainConfig
    base_model_prefix = "model"
    _no_split_modules = ["ModtrainDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # Decisions compare numbers that are close: the rest may be narrower.
    _keep_in_fp32_modules_strict = ["router", "attention_router", "mlp_router"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a new model; a router's scores have the scale of its input."""
        super()._init_weights(module)
        std, size = self.config.initializer_range, self.config.hidden_size
        if isinstance(module, ModtrainRouter):
            if self.config.router_score == "linear":
                init.normal_(module.weight, std=size**-0.5)
            if "threshold" in (self.config.decisions or []):
                init.zeros_(module.threshold)
            if self.config.gate_scale:
                init.ones_(module.gate_scale)
        elif isinstance(module, ModtrainConvolution):
            init.normal_(module.taps, std=self.config.conv_width**-0.5)
        elif isinstance(module, ModtrainExpertRouter):
            init.normal_(module.weight, std=std)
            if self.config.expert_bias:
                init.zeros_(module.bias)
            if self.config.expert_choice == "expert":
                init.constant_(module.quantile, 1 / len(module.weight))
        elif isinstance(module, ModtrainExperts):
            for weight in (module.up_proj, module.gate_proj, module.down_proj):
                if weight is not None:
                    init.normal_(weight, std=std)


class ModtrainModel(ModtrainPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: ModtrainConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        routers_per_layer = 2 if config.routed_part == "both" else 1
        is_routed = [capacity is not None for capacity in config.layer_capacities or []]
        self.layers = nn.ModuleList(
            ModtrainDecoderLayer(config, index, routers_per_layer * sum(is_routed[:index]))
            for index in range(config.num_hidden_layers)
        )
        self.norm = ModtrainRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the tokens after those in ``past_key_values``.

        attention_mask: (B, T), 0 for padding; None: no padding.

        Raises:
            ValueError: the mask is not of that shape, the cache is of another class, or not exactly
                one of ``input_ids`` and ``inputs_embeds`` is given.
        """
        del kwargs
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x_BSD: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = ModtrainCache(self.config)
        if past_key_values is not None and not isinstance(past_key_values, ModtrainCache):
            name = type(past_key_values).__name__
            raise ValueError(f"past_key_values has to be a ModtrainCache, not a {name}")
        seen = 0 if past_key_values is None else past_key_values.seen
        valid_BT = self._valid(attention_mask, x_BSD, seen)
        if position_ids is None:
            position_ids = (valid_BT.long().cumsum(dim=1) - 1).clamp(min=0)[:, seen:]
        position_BS = position_ids.expand(x_BSD.shape[:2])
        angles = self._angles(position_BS)
        states = [x_BSD]
        for index, layer in enumerate(self.layers):
            cache = None if past_key_values is None else past_key_values.layers[index]
            x_BSD = layer(x_BSD, position_BS, valid_BT[:, seen:], angles, cache=cache, seen=seen)
            states.append(x_BSD)
        if past_key_values is not None:
            past_key_values.seen += x_BSD.shape[1]
        x_BSD = self.norm(x_BSD)
        states[-1] = x_BSD
        return BaseModelOutputWithPast(
            last_hidden_state=x_BSD,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _valid(self, attention_mask: Tensor | None, x_BSD: Tensor, seen: int) -> Tensor:
        """Return which tokens (B, T) of the text so far are no padding."""
        shape = (x_BSD.shape[0], seen + x_BSD.shape[1])
        if attention_mask is None:
            return torch.ones(shape, dtype=torch.bool, device=x_BSD.device)
        if attention_mask.shape != shape:
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, not {shape}")
        return attention_mask.to(x_BSD.device).bool()

    def _angles(self, position_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of each position's angles (B, S, W / 2)."""
        rope = self.config.rope_parameters or {}
        width, theta, kind = self.config.head_dim, rope["rope_theta"], rope.get("rope_type")
        if kind not in (None, "default"):
            scaled_W, amplitude = ROPE_INIT_FUNCTIONS[kind](self.config, position_BS.device)
            angle_BSW = position_BS.unsqueeze(-1).float() * scaled_W
            return angle_BSW.cos() * amplitude, angle_BSW.sin() * amplitude
        index_W = torch.arange(0, width, 2, device=position_BS.device, dtype=torch.float32)
        angle_BSW = position_BS.unsqueeze(-1).float() * theta ** -(index_W / width)
        return angle_BSW.cos(), angle_BSW.sin()


class ModtrainForCausalLM(ModtrainPreTrainedModel, GenerationMixin):
    """The decoder with a head over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ModtrainConfig) -> None:
        super().__init__(config)
        self.model = ModtrainModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, and with ``labels`` the mean cross-entropy; see `ModtrainModel.forward`.

        logits_to_keep: of how many last tokens, or of which; 0: of all.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            return_dict=True,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Put the model's own cache among the arguments of its forward pass."""
        del args, kwargs
        kind = generation_config.cache_implementation
        # The last one is what a model that drafts gets from the first versions of transformers 5.
        if kind not in (None, "dynamic", "dynamic_full"):
            raise ValueError(f"cache_implementation={kind}: the model has a cache of its own")
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            cache = model_kwargs["past_key_values"] = ModtrainCache(self.config)
            if generation_config.is_assistant:
                cache.activate_past_recording()
