"""Held-out loss, causal and not, and how well the predictors guess.

Top-k decides with the future in view, so its loss on held-out text flatters: what a model is judged
by is the causal loss, under its own predictors. For a model without routing both are one.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from modtrain.models.depth import RoutingRecord, Selection
from modtrain.models.flops import forward_flops, realised_flops
from modtrain.models.transformer import Transformer


@dataclass
class PredictorScores:
    """How a layer's predictor does against its top-k, over the held-out tokens.

    Four of five tokens and more are skipped, so accuracy alone says little.
    """

    accuracy: float
    f1: float
    balanced_accuracy: float


@dataclass
class HeldOut:
    """Means over the held-out tokens; losses in nats a token.

    causal_loss: what sampling would see, None for a routed model without a causal decision.
    top_k_loss: 'not causal', None for a dense model.
    realised_capacity: share of tokens that took part, by routed layer, under causal decisions.
    predictor: scores by routed layer. *_flops: executed forward FLOPs a token.
    """

    tokens: int
    causal_loss: float | None
    top_k_loss: float | None
    causal_flops: float | None
    top_k_flops: float
    realised_capacity: dict[int, float] = field(default_factory=dict)
    predictor: dict[int, PredictorScores] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


class _LayerCounts:
    """Running counts of one routed layer, on the device."""

    def __init__(self) -> None:
        self.chosen = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)
        self.confusion = torch.zeros(4, dtype=torch.float64)

    def add_causal(self, record: RoutingRecord) -> None:
        # A sequence's attention products grow with the square of its own number of tokens.
        count_B = record.chosen_BS.sum(dim=1).cpu().double()
        self.chosen += count_B.sum()
        self.squares += (count_B**2).sum()

    def add_top_k(self, record: RoutingRecord) -> None:
        if record.predictor_BS is None:
            return
        guess = record.predictor_BS > 0
        cell = guess.long() * 2 + record.chosen_BS.long()
        self.confusion += torch.bincount(cell.flatten(), minlength=4).cpu().double()

    def scores(self) -> PredictorScores:
        true_no, missed, false_yes, true_yes = self.confusion.tolist()
        total = true_no + missed + false_yes + true_yes
        recall = true_yes / max(1.0, true_yes + missed)
        rejection = true_no / max(1.0, true_no + false_yes)
        f1 = 2 * true_yes / max(1.0, 2 * true_yes + missed + false_yes)
        return PredictorScores((true_no + true_yes) / total, f1, (recall + rejection) / 2)


def evaluate(
    model: Transformer,
    batches: Iterable[Tensor],
    precision: AbstractContextManager[Any],
) -> HeldOut:
    """Evaluate ``model`` on batches (B, S + 1) of token ids, under top-k and causally.

    precision: the context to compute in, such as a strategy's forward context.

    Raises:
        ValueError: there is no batch.
    """
    causal: Selection = "predictor" if _has_predictor(model) else "top_k"
    layers = [_LayerCounts() for _ in model.routed_layers]
    sums = {"causal": 0.0, "top_k": 0.0}
    tokens = sequences = seq_len = 0
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.no_grad(), precision:
        for batch in batches:
            batch_BT = batch.to(device)
            count = batch_BT[:, 1:].numel()
            tokens, sequences = tokens + count, sequences + len(batch_BT)
            seq_len = batch_BT.shape[1] - 1
            output = model(batch_BT[:, :-1], batch_BT[:, 1:], selection="top_k")
            sums["top_k"] += float(output.loss) * count
            for layer, record in zip(layers, output.routing, strict=True):
                layer.add_top_k(record)
            if causal == "top_k":
                continue
            output = model(batch_BT[:, :-1], batch_BT[:, 1:], selection=causal)
            sums["causal"] += float(output.loss) * count
            for layer, record in zip(layers, output.routing, strict=True):
                layer.add_causal(record)
    model.train(was_training)
    if tokens == 0:
        raise ValueError("there are no held-out batches")
    return _summary(model, layers, sums, tokens, sequences, seq_len)


def _summary(
    model: Transformer,
    layers: list[_LayerCounts],
    sums: dict[str, float],
    tokens: int,
    sequences: int,
    seq_len: int,
) -> HeldOut:
    config = model.config
    top_k_flops = forward_flops(config, seq_len).total / seq_len
    if not model.routed_layers:
        loss = sums["top_k"] / tokens
        return HeldOut(tokens, loss, None, top_k_flops, top_k_flops)
    if not _has_predictor(model):
        return HeldOut(tokens, None, sums["top_k"] / tokens, None, top_k_flops)
    by_layer = dict(zip(model.routed_layers, layers, strict=True))
    processed = [
        (float(by_layer[i].chosen) / sequences, float(by_layer[i].squares) / sequences)
        if i in by_layer
        else (float(seq_len), float(seq_len**2))
        for i in range(config.num_layers)
    ]
    return HeldOut(
        tokens,
        sums["causal"] / tokens,
        sums["top_k"] / tokens,
        realised_flops(config, seq_len, processed).total / seq_len,
        top_k_flops,
        {i: float(counts.chosen) / tokens for i, counts in by_layer.items()},
        {i: counts.scores() for i, counts in by_layer.items()},
    )


def _has_predictor(model: Transformer) -> bool:
    return "predictor" in model.config.router.causal and bool(model.routed_layers)
