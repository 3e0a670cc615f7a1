"""Losses that train causal decisions to agree with top-k (arXiv 2404.02258, section 3.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from modtrain.models.sequence import RoutingRecord


def predictor_loss(records: tuple[RoutingRecord, ...]) -> Tensor | None:
    """Mean binary cross-entropy of the predictors against the choices; None without predictors."""
    return _mean_cross_entropy([(r, r.predictor_BS) for r in records if r.predictor_BS is not None])


def auxiliary_loss(records: tuple[RoutingRecord, ...]) -> Tensor | None:
    """The same with the scores as logits: centres their sigmoid on 1/2 (section 3.5)."""
    return _mean_cross_entropy([(r, r.scores_BS) for r in records])


def _mean_cross_entropy(predictions: list[tuple[RoutingRecord, Tensor]]) -> Tensor | None:
    losses = []
    for record, logits_BS in predictions:
        target_BS = record.chosen_BS.to(logits_BS.dtype)
        loss_BS = F.binary_cross_entropy_with_logits(logits_BS, target_BS, reduction="none")
        if record.valid_BS is None:
            losses.append(loss_BS.mean())
        else:
            valid_BS = record.valid_BS.expand_as(loss_BS)
            losses.append(loss_BS.where(valid_BS, 0).sum() / valid_BS.sum().clamp(min=1))
    return torch.stack(losses).mean() if losses else None
