"""Who takes part: from scores to the places that a routed layer computes.

Shapes: B batch, S sequence, K places.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modtrain.models.sequence import SequenceContext


class Places(NamedTuple):
    """The tokens that a layer computes.

    index_BK: their positions; the chosen come first, in ascending order, which keeps plain causal
    attention among them valid. filled_BK: False for places that hold nobody; None: all are filled.
    rows: the sequences of the batch that the places are of, and ``counts`` how many of them are
    filled; None: all, in order.
    """

    index_BK: Tensor
    filled_BK: Tensor | None = None
    rows: list[int] | None = None
    counts: list[int] | None = None


def top_k(scores_BS: Tensor, count: int) -> Tensor:
    """Return the indices (B, K) of the ``count`` largest scores of each sequence, ascending."""
    index_BK: Tensor = scores_BS.detach().topk(count, dim=1, sorted=False).indices
    return index_BK.sort(dim=1).values


def expert_choice(scores_BS: Tensor, count: int, context: SequenceContext) -> Places:
    """Choose the ``count`` best of each sequence, or of each document its share of them.

    A document from the a-th to before the b-th token takes round(b k / S) - round(a k / S) tokens,
    so that a sequence of documents takes k as well. A sequence with padding takes its share of k,
    at least 1, from the valid tokens.
    """
    if context.documents_BS is None and context.valid_BS is None:
        return Places(top_k(scores_BS, count))
    chosen_BS = best_of_documents(scores_BS, count, context.documents_BS, context.valid_BS)
    index_BK = first_places(chosen_BS, count)
    if context.valid_BS is None:
        return Places(index_BK)
    return Places(index_BK, chosen_BS.gather(1, index_BK))


def best_of_documents(
    scores_BS: Tensor, count: int, documents_BS: Tensor | None, valid_BS: Tensor | None
) -> Tensor:
    """Return who is among the best of its document (B, S); ``expert_choice`` says how many."""
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
    # By document, and within it by falling score: a document keeps its place in the sequence.
    by_score_BS = scores_BS.argsort(dim=1, descending=True, stable=True)
    by_document_BS = documents_BS.gather(1, by_score_BS).argsort(dim=1, stable=True)
    order_BS = by_score_BS.gather(1, by_document_BS)
    place_S = torch.arange(length, device=device)
    is_first_BS = torch.ones_like(valid_BS)
    is_first_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    start_BS = torch.where(is_first_BS, place_S, 0).cummax(dim=1).values
    is_last_BS = torch.ones_like(valid_BS)
    is_last_BS[:, :-1] = is_first_BS[:, 1:]
    last_BS = torch.where(is_last_BS, place_S, length).flip(1).cummin(dim=1).values.flip(1)
    # How many valid tokens there are up to each, and how many of these are to be chosen.
    seen_BS = valid_BS.long().cumsum(dim=1)
    total_B1 = seen_BS[:, -1:]
    share_B1 = _share_of_valid(count, valid_BS)
    quota_BS = (2 * seen_BS * share_B1 + total_B1) // (2 * total_B1).clamp(min=1)
    before_BS = torch.where(start_BS > 0, quota_BS.gather(1, (start_BS - 1).clamp(min=0)), 0)
    own_BS = quota_BS.gather(1, last_BS) - before_BS
    taken_BS = place_S - start_BS < own_BS
    return torch.zeros_like(valid_BS).scatter(1, order_BS, taken_BS)


def _share_of_valid(count: int, valid_BS: Tensor) -> Tensor:
    """Return the tokens (B, 1) to choose of each sequence: count n / S of n valid, 1 at least."""
    length = valid_BS.shape[1]
    total_B1 = valid_BS.sum(dim=1, keepdim=True)
    return ((2 * total_B1 * count + length) // (2 * length)).clamp(min=1)


def first_places(chosen_BS: Tensor, count: int) -> Tensor:
    """Return ``count`` indices (B, K): the chosen in order, then others to make up the number."""
    return torch.argsort(chosen_BS.logical_not().byte(), dim=1, stable=True)[:, :count]


def token_choice(
    scores_BS: Tensor,
    count: int,
    places: int,
    threshold: Tensor,
    has_threshold: Tensor,
    valid_BS: Tensor | None = None,
) -> Tensor:
    """Choose the tokens above ``threshold``, the best ``places`` of a sequence at most.

    Before there is a threshold, the ``count`` best, or their share of the valid tokens.

    Returns who is chosen (B, S).
    """
    scores_BS = scores_BS.detach()
    share_B1 = torch.full_like(scores_BS[:, :1], count, dtype=torch.long)
    if valid_BS is not None:
        scores_BS = scores_BS.masked_fill(~valid_BS, float("-inf"))
        share_B1 = _share_of_valid(count, valid_BS.expand_as(scores_BS))
    best = scores_BS.topk(places, dim=1)
    rank_K = torch.arange(places, device=scores_BS.device)
    above_BK = torch.where(has_threshold, best.values > threshold, rank_K < share_B1)
    above_BK = above_BK & (best.values > float("-inf"))
    return torch.zeros_like(scores_BS, dtype=torch.bool).scatter(1, best.indices, above_BK)


def places_of(chosen_BS: Tensor, counts: list[int]) -> Places | None:
    """Return the places of the sequences in which anybody is chosen; None where nobody is.

    counts: how many are chosen of each sequence.
    """
    rows = [row for row, count in enumerate(counts) if count]
    if not rows:
        return None
    if len(rows) < len(counts):
        chosen_BS = chosen_BS[torch.tensor(rows, device=chosen_BS.device)]
    own = [counts[row] for row in rows]
    if chosen_BS.shape[1] == 1:
        return Places(chosen_BS.new_zeros(chosen_BS.shape, dtype=torch.long), None, rows, own)
    index_BK = first_places(chosen_BS, max(own))
    filled_BK = None if min(own) == max(own) else chosen_BS.gather(1, index_BK)
    return Places(index_BK, filled_BK, rows, own)


def within(wanted_BS: Tensor, allowed_BS: Tensor, taken_B1: Tensor | int) -> Tensor:
    """Choose the wanted tokens (B, S) as long as they are allowed, the earlier ones first.

    allowed_BS: how many may be chosen up to each token, rising; what was chosen before the first
    one, ``taken_B1``, included.
    """
    # N_t = min(N_(t-1) + w_t, a_t), written without the recursion.
    wished_BS = wanted_BS.long().cumsum(dim=1)
    slack_BS = (allowed_BS - wished_BS).cummin(dim=1).values
    total_BS = wished_BS + torch.minimum(slack_BS, torch.zeros_like(slack_BS) + taken_B1)
    before_BS = torch.cat([torch.zeros_like(total_BS[:, :1]) + taken_B1, total_BS[:, :-1]], dim=1)
    return total_BS > before_BS


def quantile(scores_BS: Tensor, count: int, valid_BS: Tensor | None) -> Tensor:
    """Return the score that ``count`` of S tokens lie above, over the whole batch, as a scalar.

    It is the middle between the last score above and the first one below.
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
    above_1 = ((2 * total * count + length) // (2 * length)).clamp(min=1)
    pair_2 = torch.stack([above_1 - 1, torch.minimum(above_1, (total - 1).clamp(min=0))])
    return ranked_N.gather(0, pair_2).mean()
