"""A mixture of experts in loops over tokens and experts, and what its tests draw.

Written from the papers and the docstrings, it shares no code with `modtrain.models.experts.layer`.

Shapes: B batch, S sequence, D model, R experts with no-ops.
"""

import math
from collections import Counter
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from modtrain.models.config import ModelConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.experts.layer import Experts
from modtrain.models.sequence import SequenceContext, sequence_context
from tests.helpers.model_cases import normal

DIM = 6
TRAINING = ("top_k", "token")


def config_of(activation: str = "swiglu", **experts: Any) -> ModelConfig:
    experts = {"count": 4, "dim": 5} | experts
    config = ModelConfig(
        d_model=DIM, num_heads=1, d_ff=10, activation=activation, experts=ExpertsConfig(**experts)
    )
    assert config.problems() == []
    return config


def lively(config: ModelConfig, seed: int = 0) -> Experts:
    """A layer far from its start, in float64, with buffers that have seen some training."""
    layer = Experts(config).double()
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    with torch.no_grad():
        for number, (name, tensor) in enumerate(tensors):
            noise = normal(*tensor.shape, seed=100 * seed + number)
            if name == "norm.gain":
                tensor.copy_(1 + 0.3 * noise)
            elif name.startswith("quantile"):
                tensor.copy_(0.5 if name == "quantile_weight" else 0.2 + 0.1 * noise)
            else:
                tensor.copy_(noise / (1 if name in ("bias", "expert_router.weight") else 2))
    return layer


def context_of(
    length: int, selection: str = "top_k", valid_BS: Tensor | None = None
) -> SequenceContext:
    positions_BS = torch.arange(length).unsqueeze(0)
    return sequence_context(positions_BS, DIM, 1e4, selection=selection, valid_BS=valid_BS)


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> ModelConfig:
    """Every kind of mixture, small."""
    choice = fixed.get("choice") or draw(st.sampled_from(["token", "expert"]))
    count, noop = draw(st.integers(1, 4)), draw(st.integers(0, 2))
    if count + noop == 1:
        # Alone, an expert would have nothing but ties to choose from, and a token no choice.
        noop = 1
    values = {
        "count": count,
        "noop": noop,
        "choice": choice,
        "top_k": draw(st.integers(1, count + noop)),
        "dim": draw(st.sampled_from([1, 5])),
        "shared": draw(st.integers(0, 2)),
        "capacity_factor": draw(st.sampled_from([None, 0.4, 1.0, 1.3])),
        "balance": draw(st.sampled_from(["loss", "bias", "none"])) if choice == "token" else None,
        "z_loss_weight": draw(st.sampled_from([0.0, 0.001])),
    }
    return config_of(draw(st.sampled_from(["swiglu", "gelu"])), **(values | fixed))


def expert(p: dict[str, Tensor], name: str, number: int | None, x_D: Tensor) -> Tensor:
    """One expert, or the shared one, whose weights are those of linear layers."""
    if number is None:
        up, gate, down = (p.get(f"shared.{part}.weight") for part in ("up", "gate", "down"))
        up, gate, down = (None if w is None else w.T for w in (up, gate, down))
    else:
        names = ("inner.up", "inner.gate", "inner.down")
        up, gate, down = (p[name][number] if name in p else None for name in names)
    hidden = x_D @ up
    if gate is None:
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    else:
        gated = x_D @ gate
        hidden = gated * torch.sigmoid(gated) * hidden
    return hidden @ down


def mixture(layer: Experts, config: ModelConfig, x_BSD: Tensor, context: SequenceContext) -> tuple:
    """The update of the valid tokens, elsewhere zero, and the record as a dictionary."""
    p, settings = dict(layer.named_parameters()), config.experts
    batch, length = x_BSD.shape[:2]
    valid_BS = context.valid_BS
    if valid_BS is None:
        valid_BS = torch.ones(batch, length, dtype=torch.bool)
    tokens = [(b, t) for b in range(batch) for t in range(length) if valid_BS[b, t]]
    x = {}
    for token in tokens:
        scale = torch.sqrt(x_BSD[token].square().mean() + config.norm_eps)
        x[token] = x_BSD[token] / scale * p["norm.gain"]
    logits = {token: p["expert_router.weight"] @ x[token] for token in tokens}
    odds = {token: logits[token].exp() / logits[token].exp().sum() for token in tokens}
    if settings.choice == "token":
        pairs, load, dropped = by_token(layer, settings, length, tokens, logits, odds, context)
        quantiles = None
    else:
        pairs, load, quantiles = by_expert(layer, settings, batch, length, tokens, odds, context)
        dropped = 0.0
    rows = [[torch.zeros(DIM, dtype=x_BSD.dtype) for _ in range(length)] for _ in range(batch)]
    for (b, t), number, weight in pairs:
        rows[b][t] = rows[b][t] + weight * expert(p, "", number, x[b, t])
    if settings.shared:
        for b, t in tokens:
            rows[b][t] = rows[b][t] + expert(p, "shared", None, x[b, t])
    update_BSD = torch.stack([torch.stack(row) for row in rows])

    choices = settings.count + settings.noop
    total = max(1, sum(load.values()))
    load_R = [load[number] / total for number in range(choices)]
    executed = Counter(number for _, number, _ in pairs)
    record = {
        "load": torch.tensor(load_R, dtype=torch.float64),
        "executed_E": torch.tensor([float(executed[number]) for number in range(settings.count)]),
        "dropped": torch.tensor(float(dropped), dtype=torch.float64),
        "quantile_E": quantiles,
        "balance_loss": None,
        "z_loss": None,
    }
    count = max(1, len(tokens))
    if settings.balance_kind == "loss":
        mean = [sum(odds[token][number] for token in tokens) / count for number in range(choices)]
        record["balance_loss"] = choices * sum(f * m for f, m in zip(load_R, mean, strict=True))
    if settings.z_loss_weight:
        record["z_loss"] = sum(logits[t].exp().sum().log() ** 2 for t in tokens) / count
    return update_BSD, record


def by_token(layer, settings, length, tokens, logits, odds, context):
    choices = settings.count + settings.noop
    capacity = math.inf
    if settings.capacity_factor is not None and context.selection in TRAINING:
        capacity = max(1, math.ceil(settings.capacity_factor * settings.top_k * length / choices))
    pairs, load, used, dropped = [], Counter(), Counter(), 0
    for b, t in tokens:
        bias = layer.bias if settings.balance_kind == "bias" else torch.zeros(choices)
        order = sorted(range(choices), key=lambda r: -float(logits[b, t][r].detach() + bias[r]))
        chosen = order[: settings.top_k]
        total = 1 if settings.top_k == 1 else sum(odds[b, t][number] for number in chosen)
        for number in chosen:
            load[number] += 1
            if number >= settings.count:
                continue
            if used[b, number] == capacity:
                dropped += 1
                continue
            used[b, number] += 1
            pairs.append(((b, t), number, odds[b, t][number] / total))
    computing = sum(load[number] for number in range(settings.count))
    return pairs, load, dropped / max(1, computing)


def by_expert(layer, settings, batch, length, tokens, odds, context):
    pairs, load = [], Counter()
    if context.selection not in TRAINING:
        quantiles = layer.quantile_sum / layer.quantile_weight
        for token in tokens:
            for number in range(settings.count):
                if odds[token][number] > quantiles[number]:
                    pairs.append((token, number, odds[token][number]))
                    load[number] += 1
        return pairs, load, None
    even = (settings.capacity_factor or 1) * settings.top_k * length
    slots = min(length, max(1, round(even / (settings.count + settings.noop))))
    taken = 0
    for b in range(batch):
        mine = [token for token in tokens if token[0] == b]
        capacity = min(len(mine), max(1, math.floor(slots * len(mine) / length + 0.5)))
        taken += capacity
        for number in range(settings.count):
            order = sorted(mine, key=lambda token: -float(odds[token][number].detach()))
            pairs += [(token, number, odds[token][number]) for token in order[:capacity]]
            load[number] += capacity
    quantiles = []
    for number in range(settings.count):
        ranked = sorted((float(odds[token][number].detach()) for token in tokens), reverse=True)
        ranked += [0.0, 0.0]
        quantiles.append((ranked[max(0, taken - 1)] + ranked[taken]) / 2)
    return pairs, load, torch.tensor(quantiles, dtype=torch.float64)


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=1e-9, atol=1e-10, msg=lambda m: f"{what}: {m}"
    )
