"""What routers do, as numbers and as a picture."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modtrain.models.depth import RoutingRecord


def routing_metrics(
    layers: tuple[int, ...], records: tuple[RoutingRecord, ...]
) -> dict[str, Tensor]:
    """Describe each routed layer's decisions over a batch.

    ``score_mean``, ``score_std``: of the scores. ``chosen_again``: of the tokens chosen here, the
    share that the routed layer before chose too; by chance it is the capacity.
    ``position_entropy``: of the chosen tokens' positions, over log S; 1 is an even spread.
    """
    found: dict[str, Tensor] = {}
    before: Tensor | None = None
    for layer, record in zip(layers, records, strict=True):
        name = f"router/layer_{layer:02d}"
        chosen = record.chosen_BS
        found[f"{name}/score_mean"] = record.scores_BS.detach().mean()
        found[f"{name}/score_std"] = record.scores_BS.detach().std()
        if before is not None:
            both = (chosen & before).sum()
            found[f"{name}/chosen_again"] = both / chosen.sum().clamp(min=1)
        found[f"{name}/position_entropy"] = _position_entropy(chosen)
        before = chosen
    return found


def chosen_picture(records: tuple[RoutingRecord, ...], height: int = 8) -> Tensor:
    """Return a grey picture (1, layers x height, S) of the first sequence: white took part."""
    rows = torch.stack([record.chosen_BS[0] for record in records]).float()
    return rows.repeat_interleave(height, dim=0).unsqueeze(0)


def _position_entropy(chosen_BS: Tensor) -> Tensor:
    share_S = chosen_BS.float().sum(dim=0)
    share_S = share_S / share_S.sum().clamp(min=1)
    entropy = -(share_S * share_S.clamp(min=1e-12).log()).sum()
    return entropy / math.log(max(2, chosen_BS.shape[1]))
