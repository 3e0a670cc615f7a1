"""What routers do, as numbers and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modtrain.models.sequence import ExpertRecord, RoutingRecord


def routing_metrics(labels: Sequence[str], records: Sequence[RoutingRecord]) -> dict[str, Tensor]:
    """Describe each depth router's decisions over a batch.

    ``score_mean``, ``score_std``: of the scores. ``above_half``: share of scores whose sigmoid is
    above 1/2, which the auxiliary loss draws towards the capacity. ``chosen``: share that took
    part. ``chosen_again``: of the tokens chosen here, the share that the router before chose too;
    by chance it is the capacity. ``position_entropy``: of the chosen tokens' positions, over log S;
    1 is an even spread.
    """
    found: dict[str, Tensor] = {}
    before: Tensor | None = None
    for label, record in zip(labels, records, strict=True):
        name = f"router/{label}"
        chosen, scores = record.chosen_BS, record.scores_BS.detach()
        found[f"{name}/score_mean"] = scores.mean()
        found[f"{name}/score_std"] = scores.std()
        found[f"{name}/above_half"] = (scores > 0).float().mean()
        found[f"{name}/chosen"] = chosen.float().mean()
        if before is not None:
            both = (chosen & before).sum()
            found[f"{name}/chosen_again"] = both / chosen.sum().clamp(min=1)
        found[f"{name}/position_entropy"] = _position_entropy(chosen)
        before = chosen
    return found


def expert_metrics(
    labels: Sequence[str], records: Sequence[ExpertRecord], num_noop: int
) -> dict[str, Tensor]:
    """Describe each mixture of experts over a batch.

    ``load_max``: the largest share of the choices over an even one; 1 is even. ``load_entropy``:
    of the shares, over the log of their number. ``dropped``: share of choices that found no room.
    ``noop_share``: share of the choices that fell on no-op experts, where there are any.
    """
    found: dict[str, Tensor] = {}
    for label, record in zip(labels, records, strict=True):
        name, load = f"experts/{label}", record.load_E.detach()
        found[f"{name}/load_max"] = load.max() * len(load)
        entropy = -(load * load.clamp(min=1e-12).log()).sum()
        found[f"{name}/load_entropy"] = entropy / math.log(max(2, len(load)))
        found[f"{name}/dropped"] = record.dropped
        if num_noop:
            found[f"{name}/noop_share"] = load[-num_noop:].sum()
    return found


def chosen_picture(records: Sequence[RoutingRecord], height: int = 8) -> Tensor:
    """Return a grey picture (1, layers x height, S) of the first sequence: white took part."""
    rows = torch.stack([record.chosen_BS[0] for record in records]).float()
    return rows.repeat_interleave(height, dim=0).unsqueeze(0)


def _position_entropy(chosen_BS: Tensor) -> Tensor:
    share_S = chosen_BS.float().sum(dim=0)
    share_S = share_S / share_S.sum().clamp(min=1)
    entropy = -(share_S * share_S.clamp(min=1e-12).log()).sum()
    return entropy / math.log(max(2, chosen_BS.shape[1]))
