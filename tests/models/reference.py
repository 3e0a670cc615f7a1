"""The model written a second time: slow, one sequence after the other, every token computed.

It shares parameters with the module, and no code. A routed block here updates all the tokens: its
attention is masked so that only chosen keys are seen, and the update is then multiplied by score
and mask, where the module gathers the chosen and never computes the others.

Shapes: S sequence, D model, H heads, W width of a head, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modtrain.models.config import ModelConfig

Parameters = dict[str, Tensor]


def rms_norm(x: Tensor, gain: Tensor | float, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * gain


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def rope(x_SW: Tensor, positions_S: Tensor, theta: float) -> Tensor:
    """Pairs (i, i + W/2) as complex numbers, turned by position * theta^(-2i/W)."""
    half = x_SW.shape[-1] // 2
    frequency_W = torch.tensor([theta ** (-i / half) for i in range(half)], dtype=torch.float32)
    # The module keeps its angles in float32, so the reference rounds them alike.
    angle_SW = torch.outer(positions_S.to(torch.float32), frequency_W).to(torch.float64)
    turned_SW = torch.complex(x_SW[:, :half], x_SW[:, half:]) * torch.polar(
        torch.ones_like(angle_SW), angle_SW
    )
    return torch.cat((turned_SW.real, turned_SW.imag), dim=-1)


def visible(chosen: list[bool], positions_S: Tensor, window: int | None) -> Tensor:
    """Who sees whom (S, S): the chosen before it, and itself so that no row is empty."""
    length = len(chosen)
    sees_SS = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(query + 1):
            near = window is None or int(positions_S[query] - positions_S[key]) < window
            sees_SS[query, key] = query == key or (chosen[key] and near)
    return sees_SS


def attention(
    p: Parameters, prefix: str, c: ModelConfig, x_SD: Tensor, chosen: list[bool], at_S: Tensor
) -> Tensor:
    group = c.num_heads // c.kv_heads
    width = c.head_width
    sees_SS = visible(chosen, at_S, c.sliding_window)
    heads = []
    for head in range(c.num_heads):
        own = slice(head * width, (head + 1) * width)
        shared = slice(head // group * width, (head // group + 1) * width)
        q_SW = x_SD @ p[f"{prefix}.q.weight"][own].T
        k_SW = x_SD @ p[f"{prefix}.k.weight"][shared].T
        v_SW = x_SD @ p[f"{prefix}.v.weight"][shared].T
        if c.qk_norm:
            q_SW = rms_norm(q_SW, p[f"{prefix}.q_norm.gain"], c.norm_eps)
            k_SW = rms_norm(k_SW, p[f"{prefix}.k_norm.gain"], c.norm_eps)
        q_SW, k_SW = rope(q_SW, at_S, c.rope_theta), rope(k_SW, at_S, c.rope_theta)
        weight_SS = torch.exp((q_SW @ k_SW.T) / math.sqrt(width)) * sees_SS
        heads.append(weight_SS / weight_SS.sum(dim=1, keepdim=True) @ v_SW)
    return torch.cat(heads, dim=1) @ p[f"{prefix}.out.weight"].T


def mlp(p: Parameters, prefix: str, c: ModelConfig, x_SD: Tensor) -> Tensor:
    up = x_SD @ p[f"{prefix}.up.weight"].T
    if c.activation == "gelu":
        hidden = gelu(up)
    else:
        gate = x_SD @ p[f"{prefix}.gate.weight"].T
        hidden = gate / (1 + torch.exp(-gate)) * up
    return hidden @ p[f"{prefix}.down.weight"].T


def block_update(
    p: Parameters, prefix: str, c: ModelConfig, x_SD: Tensor, chosen: list[bool], at_S: Tensor
) -> Tensor:
    """The block's output less its input, the residuals written out as in a common block."""
    h_SD = x_SD + attention(
        p,
        f"{prefix}.attention",
        c,
        rms_norm(x_SD, p[f"{prefix}.attention_norm.gain"], c.norm_eps),
        chosen,
        at_S,
    )
    y_SD = h_SD + mlp(
        p, f"{prefix}.mlp", c, rms_norm(h_SD, p[f"{prefix}.mlp_norm.gain"], c.norm_eps)
    )
    return y_SD - x_SD


def largest(scores_S: Tensor, capacity: float) -> list[bool]:
    """Membership of the k = max(1, round(capacity S)) largest scores."""
    length = len(scores_S)
    ranked = sorted(range(length), key=scores_S.tolist().__getitem__, reverse=True)
    members = set(ranked[: max(1, round(capacity * length))])
    return [i in members for i in range(length)]


def predict(p: Parameters, prefix: str, c: ModelConfig, x_SD: Tensor) -> Tensor:
    x = rms_norm(x_SD.detach(), 1.0, c.norm_eps)
    hidden = gelu(x @ p[f"{prefix}.hidden.weight"].T + p[f"{prefix}.hidden.bias"])
    return (hidden @ p[f"{prefix}.out.weight"].T + p[f"{prefix}.out.bias"])[:, 0]


def routed_layer(
    p: Parameters,
    prefix: str,
    c: ModelConfig,
    x_SD: Tensor,
    at_S: Tensor,
    chosen: list[bool],
) -> Tensor:
    """x + score * mask * f(x), the scores being w·x, or 1 without a gate."""
    mask_S = torch.tensor(chosen, dtype=torch.float64)
    if c.router.gate == "raw":
        mask_S = mask_S * (x_SD @ p[f"{prefix}router.weight"])
    return x_SD + mask_S[:, None] * block_update(p, f"{prefix}module", c, x_SD, chosen, at_S)


def transformer(
    p: Parameters, c: ModelConfig, tokens_S: Tensor, selection: str = "top_k"
) -> tuple[Tensor, list[list[bool]], list[Tensor]]:
    """Logits (S, V), who took part in each routed layer, and the predictors' logits."""
    length = len(tokens_S)
    at_S = torch.arange(length)
    x_SD = p["embedding.weight"][tokens_S]
    memberships, predictions = [], []
    for i, capacity in enumerate(c.capacities):
        prefix = f"layers.{i}."
        if capacity is None:
            everyone = [True] * length
            x_SD = x_SD + block_update(p, f"layers.{i}", c, x_SD, everyone, at_S)
            continue
        chosen = largest(x_SD @ p[f"{prefix}router.weight"], capacity)
        if "predictor" in c.router.causal:
            predictions.append(predict(p, f"{prefix}predictor", c, x_SD))
        if selection == "predictor":
            chosen = [logit > 0 for logit in predictions[-1].tolist()]
        memberships.append(chosen)
        x_SD = routed_layer(p, prefix, c, x_SD, at_S, chosen)
    head = p["embedding.weight" if c.tie_embeddings else "head.weight"]
    return rms_norm(x_SD, p["norm.gain"], c.norm_eps) @ head.T, memberships, predictions


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    picked_N = logits_NV[torch.arange(len(targets_N)), targets_N]
    return (torch.logsumexp(logits_NV, dim=1) - picked_N).mean()


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    yes = 1 / (1 + torch.exp(-logits))
    return -(targets * yes.log() + (1 - targets) * (1 - yes).log()).mean()
