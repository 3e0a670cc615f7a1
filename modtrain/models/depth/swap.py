"""Other choices of tokens than a trained router's, at equal realised capacity.

They measure what the router is worth: a model whose loss does not change has absorbed it.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modtrain.models.depth.config import RouterSwap
from modtrain.models.sequence import RoutingRecord


def swap_choice(swap: RouterSwap, record: RoutingRecord, norm_BS: Tensor | None) -> RoutingRecord:
    """Return other scores and chosen tokens in place of a router's own.

    Each sequence keeps its number of chosen tokens, and padding is never one. Random numbers are of
    the global generator.
    norm_BS: of the updates that all tokens would get; for ``update_norm`` only.

    Raises:
        ValueError: the choice needs a predictor, and the router has none.
    """
    scores_BS, chosen_BS = record.scores_BS, record.chosen_BS
    count_B1 = chosen_BS.sum(dim=1, keepdim=True)
    valid_BS = torch.ones_like(chosen_BS) if record.valid_BS is None else record.valid_BS
    if swap.choice == "shuffled":
        keys_BS = torch.rand(chosen_BS.shape, device=chosen_BS.device)
        # The valid tokens in a random order, then padding; and where each of them goes.
        order_BS = keys_BS.masked_fill(~valid_BS, 2.0).argsort(dim=1)
        place_BS = valid_BS.logical_not().byte().argsort(dim=1, stable=True)
        scores_BS, chosen_BS = (
            x_BS.scatter(1, place_BS, x_BS.gather(1, order_BS)) for x_BS in (scores_BS, chosen_BS)
        )
        return record._replace(scores_BS=scores_BS, chosen_BS=chosen_BS)
    if swap.choice == "even":
        number_BS = valid_BS.long().cumsum(dim=1)
        num_valid_B1 = number_BS[:, -1:].clamp(min=1)
        cumulative_BS = number_BS * count_B1 // num_valid_B1
        return record._replace(chosen_BS=cumulative_BS.diff(dim=1, prepend=0 * count_B1) > 0)
    if swap.choice == "random":
        values_BS = torch.rand(chosen_BS.shape, device=chosen_BS.device)
    elif swap.choice == "lowest":
        values_BS = -scores_BS
    elif swap.choice == "update_norm" and norm_BS is not None:
        values_BS = norm_BS
    elif swap.choice == "predictor" and record.predictor_BS is not None:
        values_BS = record.predictor_BS
    else:
        raise ValueError(f"the router has no values for the choice {swap.choice!r}")
    values_BS = values_BS.masked_fill(~valid_BS, float("-inf"))
    rank_BS = values_BS.argsort(dim=1, descending=True).argsort(dim=1)
    return record._replace(chosen_BS=rank_BS < count_B1)


def mean_gate(gate_BS: Tensor, chosen_BS: Tensor) -> Tensor:
    """Return the mean gate (B, 1) of each sequence's chosen tokens; 0 without one."""
    count_B1 = chosen_BS.sum(dim=1, keepdim=True).clamp(min=1)
    return gate_BS.where(chosen_BS, 0).sum(dim=1, keepdim=True) / count_B1
