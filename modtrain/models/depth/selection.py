"""Token selection: from scores to the slots that a routed layer computes.

Shapes: B batch, S sequence, K slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modtrain.models.depth.config import ComputeBudget
from modtrain.models.depth.router import floor_share
from modtrain.models.sequence import SequenceContext


class TokenSlots(NamedTuple):
    """The tokens that a layer computes.

    index_BK: their positions; chosen tokens first, in ascending order, so that plain causal
    attention among them is valid. slot_mask_BK: False for padding slots; None: no padding.
    rows: the sequences of the batch that the slots belong to, with how many slots of each are
    filled; None: all sequences, in order.
    """

    index_BK: Tensor
    slot_mask_BK: Tensor | None = None
    rows: dict[int, int] | None = None


def top_k(scores_BS: Tensor, count: int) -> Tensor:
    """Return the indices (B, K) of the ``count`` largest scores of each sequence, ascending."""
    index_BK: Tensor = scores_BS.detach().topk(count, dim=1, sorted=False).indices
    return index_BK.sort(dim=1).values


def expert_choice(scores_BS: Tensor, count: int, context: SequenceContext) -> TokenSlots:
    """Choose the top ``count`` tokens of each sequence, or of each document its share of them.

    A document of the tokens a to b - 1 takes round(b k / S) - round(a k / S) tokens, so that a
    sequence of documents takes k in total. A sequence with padding takes its share of k, at least
    1, from the valid tokens.
    """
    if context.documents_BS is None and context.valid_BS is None:
        return TokenSlots(top_k(scores_BS, count))
    chosen_BS = top_k_of_documents(scores_BS, count, context.documents_BS, context.valid_BS)
    index_BK = chosen_first(chosen_BS, count)
    if context.valid_BS is None:
        return TokenSlots(index_BK)
    return TokenSlots(index_BK, chosen_BS.gather(1, index_BK))


def top_k_of_documents(
    scores_BS: Tensor, count: int, documents_BS: Tensor | None, valid_BS: Tensor | None
) -> Tensor:
    """Return which tokens (B, S) are among the top of their document; see `expert_choice`."""
    scores_BS = scores_BS.detach()
    batch, length = scores_BS.shape
    device = scores_BS.device
    if documents_BS is None:
        documents_BS = torch.zeros(1, 1, dtype=torch.long, device=device)
    documents_BS = documents_BS.expand(batch, length)
    if valid_BS is None:
        valid_BS = torch.ones(1, 1, dtype=torch.bool, device=device)
    valid_BS = valid_BS.expand(batch, length)
    scores_BS = scores_BS.masked_fill(~valid_BS, float("-inf"))
    # By document, and within it by descending score; a document keeps its range of positions.
    by_score_BS = scores_BS.argsort(dim=1, descending=True, stable=True)
    by_document_BS = documents_BS.gather(1, by_score_BS).argsort(dim=1, stable=True)
    order_BS = by_score_BS.gather(1, by_document_BS)
    position_S = torch.arange(length, device=device)
    is_first_BS = torch.ones_like(valid_BS)
    is_first_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    start_BS = torch.where(is_first_BS, position_S, 0).cummax(dim=1).values
    is_last_BS = torch.ones_like(valid_BS)
    is_last_BS[:, :-1] = is_first_BS[:, 1:]
    last_BS = torch.where(is_last_BS, position_S, length).flip(1).cummin(dim=1).values.flip(1)
    # Number of valid tokens up to each position, and how many of these to choose.
    num_valid_BS = valid_BS.long().cumsum(dim=1)
    total_B1 = num_valid_BS[:, -1:]
    share_B1 = rounded_share(count, total_B1, length)
    quota_BS = (2 * num_valid_BS * share_B1 + total_B1) // (2 * total_B1).clamp(min=1)
    before_BS = torch.where(start_BS > 0, quota_BS.gather(1, (start_BS - 1).clamp(min=0)), 0)
    document_quota_BS = quota_BS.gather(1, last_BS) - before_BS
    chosen_BS = position_S - start_BS < document_quota_BS
    return torch.zeros_like(valid_BS).scatter(1, order_BS, chosen_BS)


def rounded_share(count: int, num_valid: Tensor, length: int) -> Tensor:
    """Return round(count n / S) of n valid tokens, at least 1, in integer arithmetic."""
    return ((2 * count * num_valid + length) // (2 * length)).clamp(min=1)


def chosen_first(chosen_BS: Tensor, count: int) -> Tensor:
    """Return ``count`` indices (B, K): the chosen tokens in order, then others as padding."""
    return torch.argsort(chosen_BS.logical_not().byte(), dim=1, stable=True)[:, :count]


def token_choice(
    scores_BS: Tensor,
    count: int,
    num_slots: int,
    threshold: Tensor,
    has_threshold: Tensor,
    valid_BS: Tensor | None = None,
) -> Tensor:
    """Choose the tokens above ``threshold``, at most the top ``num_slots`` of a sequence.

    Before there is a threshold, the top ``count``, or the valid tokens' share of them.

    Returns the chosen tokens (B, S).
    """
    scores_BS = scores_BS.detach()
    share_B1 = torch.full_like(scores_BS[:, :1], count, dtype=torch.long)
    if valid_BS is not None:
        scores_BS = scores_BS.masked_fill(~valid_BS, float("-inf"))
        total_B1 = valid_BS.expand_as(scores_BS).sum(dim=1, keepdim=True)
        share_B1 = rounded_share(count, total_B1, scores_BS.shape[1])
    best = scores_BS.topk(num_slots, dim=1)
    rank_K = torch.arange(num_slots, device=scores_BS.device)
    above_BK = torch.where(has_threshold, best.values > threshold, rank_K < share_B1)
    above_BK = above_BK & (best.values > float("-inf"))
    return torch.zeros_like(scores_BS, dtype=torch.bool).scatter(1, best.indices, above_BK)


def filled_slots(chosen_BS: Tensor, counts: list[int]) -> TokenSlots | None:
    """Return the slots of sequences with chosen tokens, ``counts`` of each; None if none has."""
    rows = {row: count for row, count in enumerate(counts) if count}
    if not rows:
        return None
    if len(rows) < len(counts):
        chosen_BS = chosen_BS[torch.tensor([*rows], device=chosen_BS.device)]
    if chosen_BS.shape[1] == 1:
        return TokenSlots(torch.zeros_like(chosen_BS, dtype=torch.long), None, rows)
    num_slots = max(rows.values())
    index_BK = chosen_first(chosen_BS, num_slots)
    is_full = min(rows.values()) == num_slots
    return TokenSlots(index_BK, None if is_full else chosen_BS.gather(1, index_BK), rows)


def apply_cumulative_cap(wanted_BS: Tensor, allowed_BS: Tensor, before_B1: Tensor | int) -> Tensor:
    """Keep the wanted tokens (B, S) while the cap allows it, earlier tokens first.

    allowed_BS: how many may be chosen up to each token, non-decreasing, including the
    ``before_B1`` tokens that were chosen before the first one.
    """
    # N_t = min(N_(t-1) + w_t, a_t), without the recursion.
    num_wanted_BS = wanted_BS.long().cumsum(dim=1)
    slack_BS = (allowed_BS - num_wanted_BS).cummin(dim=1).values
    total_BS = num_wanted_BS + torch.minimum(slack_BS, torch.zeros_like(slack_BS) + before_B1)
    first_B1 = torch.zeros_like(total_BS[:, :1]) + before_B1
    return total_BS > torch.cat([first_B1, total_BS[:, :-1]], dim=1)


def apply_budget(
    chosen_BS: Tensor, budget: ComputeBudget, context: SequenceContext, number: int
) -> Tensor:
    """Keep the chosen tokens (B, S) while the caps of a compute budget allow it.

    number: index of the router. The cache learns which tokens were routed.
    """
    if budget.step_cap is not None:
        num_entered_BS = context.num_entered_BS
        if num_entered_BS is None:
            num_entered_BS = torch.zeros_like(chosen_BS, dtype=torch.long)
        chosen_BS = chosen_BS & (num_entered_BS < budget.step_cap)
    routed = context.routed[number] if context.routed else None
    if budget.layer_cap is not None:
        # Counts from the start of the text, tokens in the cache included.
        allowed_BS = floor_share(context.positions_BS.expand_as(chosen_BS) + 1, budget.layer_cap)
        before_B = [0] if routed is None else routed.lengths
        before_B1 = torch.tensor(before_B, device=chosen_BS.device).unsqueeze(1)
        # Under another budget more tokens than allowed may have been routed before.
        allowed_BS = torch.maximum(allowed_BS, before_B1)
        chosen_BS = apply_cumulative_cap(chosen_BS, allowed_BS, before_B1)
    if routed is not None:
        counts = chosen_BS.sum(dim=1).tolist()
        index_BK = chosen_first(chosen_BS, max(counts))
        positions_BK = context.positions_BS.gather(1, index_BK)
        routed._replace(counts=counts).append((), positions_BK, None)
    return chosen_BS


def quantile(scores_BS: Tensor, count: int, valid_BS: Tensor | None) -> Tensor:
    """Return the score that ``count`` of S tokens exceed, over the whole batch, as a scalar.

    It is the midpoint between the lowest score above and the highest score below.
    """
    flat_N = scores_BS.detach().flatten()
    batch, length = scores_BS.shape
    if valid_BS is None:
        ranked_N = flat_N.sort(descending=True).values
        above = batch * count
        return (ranked_N[above - 1] + ranked_N[min(above, len(ranked_N) - 1)]) / 2
    valid_N = valid_BS.expand(batch, length).flatten()
    ranked_N = flat_N.masked_fill(~valid_N, float("-inf")).sort(descending=True).values
    total = valid_N.sum()
    above_1 = rounded_share(count, total, length)
    pair_2 = torch.stack([above_1 - 1, torch.minimum(above_1, (total - 1).clamp(min=0))])
    return ranked_N.gather(0, pair_2).mean()
