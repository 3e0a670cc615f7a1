"""The model written a second time: slow, one sequence after the other, every token computed.

It shares parameters with the module, and no code. A routed block here updates all the tokens: its
attention is masked so that only chosen keys are seen, and the update is then multiplied by score
and mask, where the module gathers the chosen and never computes the others.

Shapes: S sequence, D model, H heads, W width of a head, V vocabulary.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from modtrain.models.config import ModelConfig

Parameters = dict[str, Tensor]


def rms_norm(x: Tensor, gain: Tensor | float, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * gain


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def angles(positions: Tensor, width: int, theta: float) -> Tensor:
    """Position * theta^(-2i/W), of shape (..., W/2)."""
    frequencies = [theta ** (-2 * i / width) for i in range(width // 2)]
    return positions.unsqueeze(-1) * torch.tensor(frequencies, dtype=torch.float64)


def rope(x_SW: Tensor, positions_S: Tensor, theta: float) -> Tensor:
    """Pairs (i, i + W/2) as complex numbers, turned by their angle."""
    half = x_SW.shape[-1] // 2
    angle_SW = angles(positions_S, x_SW.shape[-1], theta)
    turned_SW = torch.complex(x_SW[:, :half], x_SW[:, half:]) * torch.polar(
        torch.ones_like(angle_SW), angle_SW
    )
    return torch.cat((turned_SW.real, turned_SW.imag), dim=-1)


class Sequence(NamedTuple):
    """One sequence: positions, and the document of each token."""

    at_S: Tensor
    documents: list[int]


def plain(length: int) -> Sequence:
    return Sequence(torch.arange(length), [0] * length)


def visible(chosen: list[bool], sequence: Sequence, window: int | None) -> Tensor:
    """Who sees whom (S, S): the chosen before it, and itself so that no row is empty."""
    length, at_S = len(chosen), sequence.at_S
    sees_SS = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(query + 1):
            near = window is None or int(at_S[query] - at_S[key]) < window
            same = sequence.documents[query] == sequence.documents[key]
            sees_SS[query, key] = query == key or (chosen[key] and near and same)
    return sees_SS


def attention(
    p: Parameters, prefix: str, c: ModelConfig, x_SD: Tensor, chosen: list[bool], seq: Sequence
) -> Tensor:
    x_SD = rms_norm(x_SD, p[f"{prefix}.norm.gain"], c.norm_eps)
    group = c.num_heads // c.kv_heads
    width, at_S = c.head_width, seq.at_S
    sees_SS = visible(chosen, seq, c.sliding_window)
    heads = []
    for head in range(c.num_heads):
        own = slice(head * width, (head + 1) * width)
        shared = slice(head // group * width, (head // group + 1) * width)
        q_SW = x_SD @ p[f"{prefix}.q.weight"][own].T
        k_SW = x_SD @ p[f"{prefix}.k.weight"][shared].T
        v_SW = x_SD @ p[f"{prefix}.v.weight"][shared].T
        if c.qkv_bias:
            q_SW = q_SW + p[f"{prefix}.q.bias"][own]
            k_SW = k_SW + p[f"{prefix}.k.bias"][shared]
            v_SW = v_SW + p[f"{prefix}.v.bias"][shared]
        if c.qk_norm:
            q_SW = rms_norm(q_SW, p[f"{prefix}.q_norm.gain"], c.norm_eps)
            k_SW = rms_norm(k_SW, p[f"{prefix}.k_norm.gain"], c.norm_eps)
        q_SW, k_SW = rope(q_SW, at_S, c.rope_theta), rope(k_SW, at_S, c.rope_theta)
        weight_SS = torch.exp((q_SW @ k_SW.T) / math.sqrt(width)) * sees_SS
        heads.append(weight_SS / weight_SS.sum(dim=1, keepdim=True) @ v_SW)
    return torch.cat(heads, dim=1) @ p[f"{prefix}.out.weight"].T


def convolution(
    p: Parameters, prefix: str, c: ModelConfig, x_SD: Tensor, chosen: list[bool], seq: Sequence
) -> Tensor:
    """Each token over the W - 1 chosen tokens before it, counted without the others."""
    x_SD = rms_norm(x_SD, p[f"{prefix}.norm.gain"], c.norm_eps)
    value_SD = x_SD @ p[f"{prefix}.value.weight"].T
    gate_SD = x_SD @ p[f"{prefix}.gate.weight"].T
    rows = []
    for i in range(len(chosen)):
        line = [j for j in range(i) if chosen[j]] + [i]
        mixed_D = torch.zeros_like(value_SD[0])
        for back in range(min(c.conv_width, len(line))):
            j = line[-1 - back]
            if seq.documents[j] == seq.documents[i]:
                mixed_D = mixed_D + p[f"{prefix}.taps"][back] * value_SD[j]
        rows.append(mixed_D)
    hidden_SD = gate_SD / (1 + torch.exp(-gate_SD)) * torch.stack(rows)
    return hidden_SD @ p[f"{prefix}.out.weight"].T


def mixer(
    p: Parameters, prefix: str, c: ModelConfig, x_SD: Tensor, chosen: list[bool], seq: Sequence
) -> Tensor:
    mix = convolution if f"{prefix}.taps" in p else attention
    return mix(p, prefix, c, x_SD, chosen, seq)


def mlp(p: Parameters, prefix: str, c: ModelConfig, x_SD: Tensor) -> Tensor:
    x_SD = rms_norm(x_SD, p[f"{prefix}.norm.gain"], c.norm_eps)
    up = x_SD @ p[f"{prefix}.inner.up.weight"].T
    if c.activation == "gelu":
        hidden = gelu(up)
    else:
        gate = x_SD @ p[f"{prefix}.inner.gate.weight"].T
        hidden = gate / (1 + torch.exp(-gate)) * up
    return hidden @ p[f"{prefix}.inner.down.weight"].T


def update(
    p: Parameters,
    part: str,
    prefix: str,
    c: ModelConfig,
    x_SD: Tensor,
    chosen: list[bool],
    seq: Sequence,
) -> Tensor:
    """The output less the input of a block, an attention or an MLP; residuals written out."""
    if part == "attention":
        return mixer(p, prefix, c, x_SD, chosen, seq)
    if part == "mlp":
        return mlp(p, prefix, c, x_SD)
    h_SD = x_SD + mixer(p, f"{prefix}.attention", c, x_SD, chosen, seq)
    y_SD = h_SD + mlp(p, f"{prefix}.mlp", c, h_SD)
    return y_SD - x_SD


def largest(scores_S: Tensor, capacity: float, documents: list[int] | None = None) -> list[bool]:
    """Membership of the k = max(1, round(capacity S)) largest scores, or each document's of its
    share of k: as many as lie between the rounded shares of k up to its ends."""
    length = len(scores_S)
    count = max(1, round(capacity * length))
    documents = documents or [0] * length
    members: set[int] = set()
    for document in sorted(set(documents)):
        own = [i for i in range(length) if documents[i] == document]
        start, end = own[0], own[-1] + 1
        quota = math.floor(end * count / length + 0.5) - math.floor(start * count / length + 0.5)
        ranked = sorted(own, key=scores_S.tolist().__getitem__, reverse=True)
        members |= set(ranked[:quota])
    return [i in members for i in range(length)]


def token_mlp(p: Parameters, prefix: str, c: ModelConfig, x_SD: Tensor) -> Tensor:
    x = rms_norm(x_SD, 1.0, c.norm_eps)
    hidden = gelu(x @ p[f"{prefix}.hidden.weight"].T + p[f"{prefix}.hidden.bias"])
    return (hidden @ p[f"{prefix}.out.weight"].T + p[f"{prefix}.out.bias"])[:, 0]


def predict(p: Parameters, prefix: str, c: ModelConfig, x_SD: Tensor) -> Tensor:
    return token_mlp(p, prefix, c, x_SD.detach())


def score(p: Parameters, prefix: str, c: ModelConfig, x_SD: Tensor) -> Tensor:
    if c.router.score == "mlp":
        return token_mlp(p, f"{prefix}router", c, x_SD)
    return x_SD @ p[f"{prefix}router.weight"]


def factor(p: Parameters, prefix: str, c: ModelConfig, x_SD: Tensor) -> Tensor:
    """What each token's update is multiplied by, were it chosen."""
    score_S = score(p, prefix, c, x_SD)
    size_S = torch.sqrt((x_SD * x_SD).mean(dim=1) + c.norm_eps)
    kinds = {
        "raw": score_S,
        "sigmoid": 1 / (1 + torch.exp(-score_S)),
        "tanh": torch.tanh(score_S / size_S if c.router.score == "linear" else score_S),
        "none": torch.ones_like(score_S),
    }
    value = kinds[c.router.gate or "raw"]
    return value * p[f"{prefix}gate.scale"] if c.router.gate_scale else value


def routed_layer(
    p: Parameters,
    prefix: str,
    c: ModelConfig,
    x_SD: Tensor,
    seq: Sequence,
    chosen: list[bool],
    part: str = "block",
) -> Tensor:
    """x + factor * mask * f(x)."""
    mask_S = torch.tensor(chosen, dtype=torch.float64) * factor(p, prefix, c, x_SD)
    return x_SD + mask_S[:, None] * update(p, part, f"{prefix}module", c, x_SD, chosen, seq)


class Trace(NamedTuple):
    """What one sequence went through: by router, in running order."""

    chosen: list[list[bool]]
    scores: list[Tensor]
    predictions: list[Tensor]


def transformer(
    p: Parameters,
    c: ModelConfig,
    tokens_S: Tensor,
    selection: str = "top_k",
    documents: list[int] | None = None,
) -> tuple[Tensor, Trace]:
    """Logits (S, V), and what was decided."""
    length = len(tokens_S)
    seq = Sequence(torch.arange(length), documents or [0] * length)
    x_SD = p["embedding.weight"][tokens_S]
    trace = Trace([], [], [])
    for i, capacity in enumerate(c.capacities):
        for part, prefix, routed in parts(c, i, capacity):
            if not routed:
                everyone = [True] * length
                x_SD = x_SD + update(p, part, f"{prefix}module", c, x_SD, everyone, seq)
                continue
            trace.scores.append(score(p, prefix, c, x_SD))
            chosen = largest(trace.scores[-1], capacity, documents)
            if "predictor" in c.router.causal_routers:
                trace.predictions.append(predict(p, f"{prefix}predictor", c, x_SD))
            if selection == "predictor":
                chosen = [logit > 0 for logit in trace.predictions[-1].tolist()]
            elif selection == "auxiliary":
                chosen = [logit > 0 for logit in trace.scores[-1].tolist()]
            elif selection == "threshold":
                edge = float(p[f"{prefix}threshold_sum"] / p[f"{prefix}threshold_weight"])
                chosen = [logit > edge for logit in trace.scores[-1].tolist()]
            trace.chosen.append(chosen)
            x_SD = routed_layer(p, prefix, c, x_SD, seq, chosen, part)
    head = p["embedding.weight" if c.tie_embeddings else "head.weight"]
    return rms_norm(x_SD, p["norm.gain"], c.norm_eps) @ head.T, trace


def parts(c: ModelConfig, i: int, capacity: float | None) -> list[tuple[str, str, bool]]:
    """What a layer is made of: part, prefix of its names, whether it is routed."""
    if capacity is None or c.router.target == "block":
        return [("block", f"layers.{i}.", capacity is not None)]
    return [
        (part, f"layers.{i}.{part}.", c.router.target in (part, "both"))
        for part in ("attention", "mlp")
    ]


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    picked_N = logits_NV[torch.arange(len(targets_N)), targets_N]
    return (torch.logsumexp(logits_NV, dim=1) - picked_N).mean()


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    yes = 1 / (1 + torch.exp(-logits))
    return -(targets * yes.log() + (1 - targets) * (1 - yes).log()).mean()
