"""Routers that score tokens, gates on their updates, and causal predictors of the choice.

Shapes: B batch, S sequence, D model, K chosen.
"""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modtrain.models.depth.config import RouterConfig


def to_fp32_or_wider(x: Tensor) -> Tensor:
    """Return ``x`` in float32 or wider: scores in bfloat16 would often tie."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LinearRouter(nn.Module):
    """One scalar per token, r = w·x, without an activation (arXiv 2404.02258, section 3.4).

    Weights begin normal with standard deviation 1 / sqrt(d_model): at zero no update would pass.
    eps: of a norm that scales x to root mean square 1 first; None: no norm.
    """

    def __init__(self, d_model: int, eps: float | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d_model).normal_(std=d_model**-0.5))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return the scores (B, S), in float32 or wider."""
        with torch.autocast(x_BSD.device.type, enabled=False):
            x_BSD = to_fp32_or_wider(x_BSD)
            if self.eps is not None:
                x_BSD = F.rms_norm(x_BSD, (x_BSD.shape[-1],), eps=self.eps)
            return x_BSD @ to_fp32_or_wider(self.weight)


class TokenMLP(nn.Module):
    """Two layers from a token to one number; base of the MLP router and the predictor.

    The input is scaled to root mean square 1, because the residual stream grows with depth.
    """

    def __init__(self, d_model: int, hidden_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.hidden = nn.Linear(d_model, hidden_dim)
        self.out = nn.Linear(hidden_dim, 1)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return one number per token (B, S), in float32 or wider."""
        x = F.rms_norm(x_BSD, (x_BSD.shape[-1],), eps=self.eps)
        out: Tensor = self.out(F.gelu(self.hidden(x))).squeeze(-1)
        return to_fp32_or_wider(out)


class MLPRouter(TokenMLP):
    """A two-layer router, in float32 under autocast too: in bfloat16 many scores would tie."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return the scores (B, S)."""
        with torch.autocast(x_BSD.device.type, enabled=False):
            return super().forward(x_BSD.to(self.out.weight.dtype))


class Predictor(TokenMLP):
    """Predicts from a token alone whether top-k will choose it (arXiv 2404.02258, section 3.5).

    Its input is detached, so it has no effect on other gradients.
    """

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return the logits (B, S) that a token is chosen, without a gradient to ``x_BSD``."""
        return super().forward(x_BSD.detach())


class RandomRouter(nn.Module):
    """A control: Gaussian scores from the global generator, drawn anew at each call."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return the scores (B, S)."""
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        return torch.randn(x_BSD.shape[:2], dtype=wide, device=x_BSD.device)


def evenly_spaced_scores(x_BSD: Tensor, count: int) -> Tensor:
    """Score ``count`` evenly spaced positions 1 and the others 0 (B, S): a control.

    With count = S / j these are the positions j - 1, 2j - 1, …
    """
    batch, length, _ = x_BSD.shape
    cumulative_S = torch.arange(length + 1, device=x_BSD.device) * count // length
    return to_fp32_or_wider(cumulative_S.diff().to(x_BSD.dtype)).expand(batch, -1)


def hash_positions(positions_BS: Tensor, share: float, salt: int) -> Tensor:
    """Choose this share of the positions pseudo-randomly (B, S): the random control when causal.

    A hash of position and ``salt`` decides, so the choice is the same for a whole sequence, for
    chunks of it, and on every device.
    """
    return _position_hash(positions_BS, salt) < int(share * 2**32)


def hashed_scores(positions_BS: Tensor, salt: int) -> Tensor:
    """Return Gaussian scores (B, S) whose largest are the tokens of `hash_positions`, in float32.

    They are the scores of a random router when causal: a chosen token's gate is distributed as that
    of a token among the top of a sequence, as in training.
    """
    share_BS = (_position_hash(positions_BS, salt).to(torch.float32) + 0.5) / 2**32
    # In float32 a share may round to 1, whose quantile is infinite.
    quantile_BS: Tensor = torch.special.ndtri(share_BS.clamp(max=1 - 1e-6))
    return -quantile_BS


def _position_hash(positions_BS: Tensor, salt: int) -> Tensor:
    """Return a hash (B, S) of each position, evenly distributed in [0, 2^32)."""
    # Multiply and shift in 32 bits, after Wellons' "lowbias32" (https://nullprogram.com, 2018).
    hashed = (positions_BS + (salt + 1) * 0x9E3779B1) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        hashed = ((hashed ^ (hashed >> shift)) * factor) & 0xFFFFFFFF
    return hashed ^ (hashed >> 16)


def floor_share(count_BS: Tensor, share: float) -> Tensor:
    """Return floor(share x count), exactly: 3 x (1 / 3) is less than 1 in floating point."""
    fraction = Fraction(share).limit_denominator(10**6)
    return count_BS * fraction.numerator // fraction.denominator


def evenly_spaced_positions(positions_BS: Tensor, share: float) -> Tensor:
    """Choose this share of the positions, evenly spaced (B, S), for any sequence length.

    If share x S is an integer, these are the positions of `evenly_spaced_scores`.
    """
    return floor_share(positions_BS + 1, share) > floor_share(positions_BS, share)


class Gate(nn.Module):
    """The factor on a chosen token's update; it puts the router on the gradient path."""

    def __init__(self, config: RouterConfig, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = config.gate_kind, eps
        # Only linear scores without a norm grow with the residual stream.
        self.normalises = config.score == "linear" and not config.norms_input
        self.multiplier, self.offset = config.gate_factor, config.gate_offset
        self.scale = nn.Parameter(torch.ones(1)) if config.gate_scale else None

    def forward(self, scores_BK: Tensor, x_BKD: Tensor) -> Tensor | None:
        """Return the factors (B, K) for tokens with these scores and features; None for 1."""
        factor_BK: Tensor | None = None
        if self.kind == "raw":
            factor_BK = scores_BK
        elif self.kind == "sigmoid":
            factor_BK = scores_BK.sigmoid()
        elif self.kind == "tanh" and self.normalises:
            mean_square_BK = to_fp32_or_wider(x_BKD).square().mean(dim=-1)
            factor_BK = (scores_BK * torch.rsqrt(mean_square_BK + self.eps)).tanh()
        elif self.kind == "tanh":
            factor_BK = scores_BK.tanh()
        if factor_BK is not None and (self.multiplier, self.offset) != (1, 0):
            factor_BK = factor_BK * self.multiplier + self.offset
        if self.scale is None:
            return factor_BK
        scale = to_fp32_or_wider(self.scale)
        return scale.expand_as(scores_BK) if factor_BK is None else factor_BK * scale


@torch.no_grad()
def update_sums(
    factor_BK: Tensor | None, update_BKD: Tensor, chosen_BKD: Tensor, slot_mask_BK: Tensor | None
) -> Tensor:
    """Return sums over the routed tokens: their number, gates, squared updates, squared stream."""
    update_BK, stream_BK = (
        to_fp32_or_wider(x_BKD).square().sum(dim=-1) for x_BKD in (update_BKD, chosen_BKD)
    )
    ones_BK = torch.ones_like(stream_BK)
    gate_BK = ones_BK if factor_BK is None else factor_BK
    values_4BK = torch.stack([ones_BK, gate_BK.to(stream_BK.dtype), update_BK, stream_BK])
    if slot_mask_BK is not None:
        values_4BK = values_4BK.where(slot_mask_BK, 0)
    return values_4BK.sum(dim=(1, 2))


def make_router(config: RouterConfig, d_model: int, eps: float) -> nn.Module | None:
    """Build the module that scores tokens; None for scores that need no module."""
    if config.score == "linear":
        return LinearRouter(d_model, eps if config.norms_input else None)
    if config.score == "mlp":
        return MLPRouter(d_model, config.hidden_dim, eps)
    return RandomRouter() if config.score == "random" else None
