"""What the parts of a model exchange: the tokens' context in, updates and records out.

Shapes: B batch, S sequence, K chosen, D model, W half the width of a head, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modtrain.models.cache.cache import CacheView
from modtrain.models.depth.config import ComputeBudget, RouterSwap, Selection
from modtrain.models.rope.config import RopeScalingConfig
from modtrain.models.rope.rotary import rotary


class SequenceContext(NamedTuple):
    """What a sequence module needs to know about its tokens besides their features.

    positions_BS: position of each token in the text; B may be 1 if all sequences agree.
    cos_BSW, sin_BSW: the rotary factors of those positions.
    selection: how routers and experts choose tokens.
    window: how many positions back attention reaches; None: all.
    documents_BS: document number of each token, rising along the sequence; None: one document.
        No information passes between documents.
    valid_BS: False for padding, which is masked and not computed; None: all are valid.
    attention_mask_BSS: True where a query (dim 1) attends to a key (last dim); None: plain causal
        attention. Under context parallelism it has the rows of the local queries only.
    capacity: share of the tokens to route in this layer; None: the layer's own.
    received_BS: mean attention that each token received in the layer before, if routers use it.
    cache: state of the layer's mixer from earlier tokens; None without a cache.
    keys_values: keys and values (B, S, G, W) of all tokens, where a router chose this context's
        tokens as queries alone, whose mask is then (B, K, S); a cache has them already. None: the
        tokens attend to each other.
    routed: by router, the tokens that were routed earlier; kept with a cache for a layer cap.
    budget: limits on what is computed; None: as trained.
    num_entered_BS: routed parts that each token entered so far in this pass; kept for a step cap.
    swap: another choice of tokens, for analysis; None: the router's own.
    gate_B1: the factor on the updates of all routed tokens of a sequence; None: the gate's.
    """

    positions_BS: Tensor
    cos_BSW: Tensor
    sin_BSW: Tensor
    selection: Selection = "top_k"
    window: int | None = None
    documents_BS: Tensor | None = None
    valid_BS: Tensor | None = None
    attention_mask_BSS: Tensor | None = None
    capacity: float | None = None
    received_BS: Tensor | None = None
    cache: CacheView | None = None
    keys_values: tuple[Tensor, Tensor] | None = None
    routed: tuple[CacheView, ...] = ()
    budget: ComputeBudget | None = None
    num_entered_BS: Tensor | None = None
    swap: RouterSwap | None = None
    gate_B1: Tensor | None = None

    def count_entered(self, routing: tuple[RoutingRecord, ...]) -> SequenceContext:
        """Return the context for the next part, after routers made the decisions ``routing``."""
        if self.budget is None or self.budget.step_cap is None or not routing:
            return self
        num_entered_BS = torch.stack([record.chosen_BS for record in routing]).sum(dim=0)
        return self._replace(
            num_entered_BS=num_entered_BS
            if self.num_entered_BS is None
            else self.num_entered_BS + num_entered_BS
        )

    def select_rows(self, rows: list[int], counts: list[int]) -> SequenceContext:
        """Return the context of the sequences ``rows`` only, with ``counts`` new tokens each.

        Every tensor must have one row per sequence.
        """
        cache = None if self.cache is None else self.cache.select_rows(rows, counts)
        if len(rows) == len(self.positions_BS):
            return self._replace(cache=cache)
        index_N = torch.tensor(rows, device=self.positions_BS.device)
        documents, valid = self.documents_BS, self.valid_BS
        return self._replace(
            positions_BS=self.positions_BS.index_select(0, index_N),
            cos_BSW=self.cos_BSW.index_select(0, index_N),
            sin_BSW=self.sin_BSW.index_select(0, index_N),
            documents_BS=None if documents is None else documents.index_select(0, index_N),
            valid_BS=None if valid is None else valid.index_select(0, index_N),
            cache=cache,
        )

    def gather(
        self, index_BK: Tensor, valid_BK: Tensor | None = None, query_index_N: Tensor | None = None
    ) -> SequenceContext:
        """Return the context of the tokens ``index_BK`` only; they keep their positions.

        valid_BK: False for padding slots. They come last, so causal attention never reads them.
        query_index_N: which of the slots are queries; None: all.
        """
        batch = index_BK.shape[0]

        def select(table_BSW: Tensor) -> Tensor:
            if table_BSW.shape[0] == 1:
                # Whole rows, which are several times faster than single features.
                return table_BSW[0][index_BK]
            index_BKW = index_BK.unsqueeze(-1).expand(-1, -1, table_BSW.shape[-1])
            return table_BSW.gather(1, index_BKW)

        positions = self.positions_BS.expand(batch, -1).gather(1, index_BK)
        documents = self.documents_BS
        if documents is not None:
            documents = documents.expand(batch, -1).gather(1, index_BK)
            if valid_BK is not None:
                # Document numbers rise along the sequence, and padding slots come last.
                documents = documents.where(valid_BK, torch.iinfo(documents.dtype).max)
        mask: Tensor | None = None
        if self.keys_values is not None and self.cache is None:
            query_BK = index_BK if query_index_N is None else index_BK[:, query_index_N]
            mask = attention_mask(
                self.positions_BS, self.window, self.documents_BS, self.valid_BS, query_BK
            )
        elif self.cache is None:
            query_1N = None if query_index_N is None else query_index_N.unsqueeze(0)
            mask = attention_mask(positions, self.window, documents, None, query_1N)
        return self._replace(
            positions_BS=positions,
            cos_BSW=select(self.cos_BSW),
            sin_BSW=select(self.sin_BSW),
            documents_BS=documents,
            valid_BS=valid_BK,
            attention_mask_BSS=mask,
        )


def sequence_context(
    positions_BS: Tensor,
    head_width: int,
    theta: float,
    *,
    scaling: RopeScalingConfig | None = None,
    selection: Selection = "top_k",
    window: int | None = None,
    documents_BS: Tensor | None = None,
    valid_BS: Tensor | None = None,
) -> SequenceContext:
    """Make the context of tokens at ``positions_BS``; scaling: of the rotary positions."""
    return SequenceContext(
        positions_BS,
        *rotary(positions_BS, head_width, theta, scaling or RopeScalingConfig()),
        selection,
        window,
        documents_BS,
        valid_BS,
        attention_mask(positions_BS, window, documents_BS, valid_BS),
    )


def attention_mask(
    positions_BS: Tensor,
    window: int | None,
    documents_BS: Tensor | None,
    valid_BS: Tensor | None,
    query_index_BN: Tensor | None = None,
) -> Tensor | None:
    """Return which keys (last dim) each query attends to (B, S, S); None: plain causal attention.

    A token always attends to itself, padding too: an empty row would give NaN.

    query_index_BN: indices of the queries to make rows for, of each sequence or (1, N) of all,
        giving (B, N, S), never None; None: all.
    """
    if window is None and documents_BS is None and valid_BS is None and query_index_BN is None:
        return None

    def queries(x_BS: Tensor) -> Tensor:
        if query_index_BN is None:
            return x_BS
        batch = max(len(x_BS), len(query_index_BN))
        return x_BS.expand(batch, -1).gather(1, query_index_BN.expand(batch, -1))

    index_1S = torch.arange(positions_BS.shape[1], device=positions_BS.device).unsqueeze(0)
    query_1N1 = queries(index_1S).unsqueeze(2)
    # By index, not position: padding tokens may share a position.
    mask = index_1S <= query_1N1
    if window is not None:
        mask = mask & (queries(positions_BS).unsqueeze(2) - positions_BS.unsqueeze(1) < window)
    if documents_BS is not None:
        mask = mask & (queries(documents_BS).unsqueeze(2) == documents_BS.unsqueeze(1))
    if valid_BS is not None:
        mask = mask & (valid_BS.unsqueeze(1) | (index_1S == query_1N1))
    return mask


class RoutingRecord(NamedTuple):
    """The decisions of one depth router.

    scores_BS: its scores. chosen_BS: True for routed tokens. predictor_BS: the predictor's logits;
    None without a predictor. valid_BS: False for padding; None: all are valid. quantile: the score
    above which the capacity's share of the batch lies; None if the router has no threshold.
    update_sums_4: sums over the routed tokens: their number, gates, squares of their gated updates,
    squares of their residual stream. None while decoding with a cache.
    """

    scores_BS: Tensor
    chosen_BS: Tensor
    predictor_BS: Tensor | None = None
    valid_BS: Tensor | None = None
    quantile: Tensor | None = None
    update_sums_4: Tensor | None = None


class ExpertRecord(NamedTuple):
    """The decisions of one mixture of experts.

    choices_R: number of choices of each expert, no-op experts last.
    executed_E: tokens computed per expert, without no-op experts and dropped tokens.
    quantile_E: expert choice's score above which an expert takes a token; None for token choice.
    balance_loss, z_loss: unweighted; None if the configuration has none.
    """

    choices_R: Tensor
    executed_E: Tensor
    quantile_E: Tensor | None = None
    balance_loss: Tensor | None = None
    z_loss: Tensor | None = None

    @property
    def load(self) -> Tensor:
        """Share (R) of all choices of each expert, no-op experts last; sums to 1."""
        return self.choices_R / self.choices_R.sum().clamp(min=1)

    @property
    def dropped(self) -> Tensor:
        """Share of the choices of computing experts that exceeded their capacity."""
        computing = self.choices_R[: len(self.executed_E)].sum()
        return (computing - self.executed_E.sum()) / computing.clamp(min=1)


class Output(NamedTuple):
    """The result of a part of the model: an update, or the residual stream after a layer.

    received_BS: mean attention that each token received, if the next layer routes by it.
    update_sums_4: see `RoutingRecord`; of a router's own layer only.
    """

    value_BSD: Tensor
    routing: tuple[RoutingRecord, ...] = ()
    experts: tuple[ExpertRecord, ...] = ()
    received_BS: Tensor | None = None
    update_sums_4: Tensor | None = None

    def with_value(self, value_BSD: Tensor) -> Output:
        """Return the same records with another update or residual stream."""
        # Not by `_replace`: a graph of torch 2.11 cannot return the tuples that it makes.
        return Output(value_BSD, *self[1:])


def as_output(result: Tensor | Output) -> Output:
    """Wrap a plain tensor in an `Output`."""
    return Output(result) if isinstance(result, Tensor) else result
