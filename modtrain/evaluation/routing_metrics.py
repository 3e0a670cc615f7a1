"""Statistics of routers and experts, and a picture of the chosen tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modtrain.models.sequence import ExpertRecord, RoutingRecord


def routing_metrics(labels: Sequence[str], records: Sequence[RoutingRecord]) -> dict[str, Tensor]:
    """Return statistics of each depth router's decisions over a batch.

    ``score_mean``, ``score_std``: of the scores. ``above_half``: share of scores whose sigmoid is
    above 1/2, which the auxiliary loss moves towards the capacity. ``chosen``: share of routed
    tokens. ``chosen_again``: share of these that the previous router chose too; by chance it is the
    capacity. ``position_entropy``: of the chosen tokens' positions, over log S; 1 for a uniform
    distribution. ``gate_mean``, ``update_ratio``: see `RoutingRecord`.
    """
    metrics: dict[str, Tensor] = {}
    before: Tensor | None = None
    for label, record in zip(labels, records, strict=True):
        name = f"router/{label}"
        chosen, scores = record.chosen_BS, record.scores_BS.detach()
        metrics[f"{name}/score_mean"] = scores.mean()
        metrics[f"{name}/score_std"] = scores.std()
        metrics[f"{name}/above_half"] = (scores > 0).float().mean()
        metrics[f"{name}/chosen"] = chosen.float().mean()
        if before is not None:
            both = (chosen & before).sum()
            metrics[f"{name}/chosen_again"] = both / chosen.sum().clamp(min=1)
        for figure in ("gate_mean", "update_ratio"):
            if (value := getattr(record, figure)) is not None:
                metrics[f"{name}/{figure}"] = value
        chosen_S = chosen.float().sum(dim=0)
        metrics[f"{name}/position_entropy"] = _entropy(chosen_S / chosen_S.sum().clamp(min=1))
        before = chosen
    return metrics


def expert_metrics(
    labels: Sequence[str], records: Sequence[ExpertRecord], num_noop: int
) -> dict[str, Tensor]:
    """Return statistics of each mixture of experts over a batch.

    ``load_max``: the largest share of the choices over an even one; 1 is even. ``load_entropy``:
    of the shares, over the log of their number. ``dropped``: share of choices beyond an expert's
    capacity. ``noop_share``: share of the choices of no-op experts, if there are any.
    """
    metrics: dict[str, Tensor] = {}
    for label, record in zip(labels, records, strict=True):
        name, load = f"experts/{label}", record.load_E.detach()
        metrics[f"{name}/load_max"] = load.max() * len(load)
        metrics[f"{name}/load_entropy"] = _entropy(load)
        metrics[f"{name}/dropped"] = record.dropped
        if num_noop:
            metrics[f"{name}/noop_share"] = load[-num_noop:].sum()
    return metrics


def chosen_picture(records: Sequence[RoutingRecord], height: int = 8) -> Tensor:
    """Return a grey image (1, routers x height, S) of the first sequence: white for routed."""
    rows = torch.stack([record.chosen_BS[0] for record in records]).float()
    return rows.repeat_interleave(height, dim=0).unsqueeze(0)


def _entropy(shares: Tensor) -> Tensor:
    """Entropy over its largest value, log N."""
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum()
    return entropy / math.log(max(2, len(shares)))
