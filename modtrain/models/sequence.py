"""What passes between the parts of a model: the tokens' context in, updates and records out.

Shapes: B batch, S sequence, K chosen, D model, W half the width of a head, E experts.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from modtrain.models.cache.cache import CacheView
from modtrain.models.depth.compute_budget import Dial
from modtrain.models.depth.config import Selection


class SequenceContext(NamedTuple):
    """What a sequence module has to know of its tokens beside their features.

    positions_BS: where each token stands in the text; B may be 1 where all sequences agree.
    cos_BSW, sin_BSW: the rotary factors of those positions.
    selection: how routers and experts are to choose.
    window: how many positions back attention sees; None: all.
    documents_BS: numbers of the documents, rising along the sequence; None where it is all one.
        Nothing passes between documents.
    valid_BS: False for padding, which nobody sees and nothing is spent on; None: all are valid.
    visible_BSS: which key (last) each query sees; None: itself and every one before. A rank that
        has a share of the sequence has the rows of its own queries.
    cache: what the layer's mixer has seen before; None where these tokens are all there is.
    taken: by router, the tokens that took part before, where ``cache`` is one and a cap asks.
    dial: how much is to be computed; None: as trained.
    entered_BS: routed parts that each token entered so far in this pass, where a cap asks.
    """

    positions_BS: Tensor
    cos_BSW: Tensor
    sin_BSW: Tensor
    selection: Selection = "top_k"
    window: int | None = None
    documents_BS: Tensor | None = None
    valid_BS: Tensor | None = None
    visible_BSS: Tensor | None = None
    cache: CacheView | None = None
    taken: tuple[CacheView, ...] = ()
    dial: Dial | None = None
    entered_BS: Tensor | None = None

    def after(self, routing: tuple[RoutingRecord, ...]) -> SequenceContext:
        """Return the context behind a part of a layer that decided so."""
        if self.dial is None or self.dial.step_cap is None or not routing:
            return self
        entered_BS = torch.stack([record.chosen_BS for record in routing]).sum(dim=0)
        return self._replace(
            entered_BS=entered_BS if self.entered_BS is None else self.entered_BS + entered_BS
        )

    def of(self, rows: list[int], counts: list[int]) -> SequenceContext:
        """Return the context of the sequences ``rows`` alone, ``counts`` new tokens of each.

        Every tensor has a row a sequence.
        """
        cache = None if self.cache is None else self.cache.of(rows, counts)
        if len(rows) == len(self.positions_BS):
            return self._replace(cache=cache)
        index_N = torch.tensor(rows, device=self.positions_BS.device)
        documents = self.documents_BS
        return self._replace(
            positions_BS=self.positions_BS.index_select(0, index_N),
            cos_BSW=self.cos_BSW.index_select(0, index_N),
            sin_BSW=self.sin_BSW.index_select(0, index_N),
            documents_BS=None if documents is None else documents.index_select(0, index_N),
            cache=cache,
        )

    def gather(
        self,
        index_BK: Tensor,
        valid_BK: Tensor | None = None,
        asking_N: Tensor | None = None,
    ) -> SequenceContext:
        """Return the context of the tokens ``index_BK`` alone; they keep their positions.

        valid_BK: False for slots that hold nobody. They stand behind the others, where causal
        attention never looks. asking_N: see `visible`.
        """
        batch = index_BK.shape[0]

        def take(table_BSW: Tensor) -> Tensor:
            if table_BSW.shape[0] == 1:
                return table_BSW[0][index_BK]
            index = index_BK.unsqueeze(-1).expand(-1, -1, table_BSW.shape[-1])
            return table_BSW.gather(1, index)

        positions = self.positions_BS.expand(batch, -1).gather(1, index_BK)
        documents = self.documents_BS
        if documents is not None:
            documents = documents.expand(batch, -1).gather(1, index_BK)
            if valid_BK is not None:
                # Numbers rise along the sequence, and who is nobody stands behind.
                documents = documents.where(valid_BK, torch.iinfo(documents.dtype).max)
        return self._replace(
            positions_BS=positions,
            cos_BSW=take(self.cos_BSW),
            sin_BSW=take(self.sin_BSW),
            documents_BS=documents,
            valid_BS=valid_BK,
            visible_BSS=None
            if self.cache is not None
            else visible(positions, self.window, documents, None, asking_N),
        )


def sequence_context(
    positions_BS: Tensor,
    head_width: int,
    theta: float,
    *,
    selection: Selection = "top_k",
    window: int | None = None,
    documents_BS: Tensor | None = None,
    valid_BS: Tensor | None = None,
    asking_N: Tensor | None = None,
) -> SequenceContext:
    """Make the context of tokens at ``positions_BS`` (RoPE, arXiv 2104.09864).

    asking_N: see `visible`.
    """
    cos_BSW, sin_BSW = rotary(positions_BS, head_width, theta)
    return SequenceContext(
        positions_BS,
        cos_BSW,
        sin_BSW,
        selection,
        window,
        documents_BS,
        valid_BS,
        visible(positions_BS, window, documents_BS, valid_BS, asking_N),
    )


def rotary(positions_BS: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of each position's angles (B, S, W)."""
    device = positions_BS.device
    exponent_W = torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width
    angle_BSW = positions_BS.unsqueeze(-1).float() * theta**-exponent_W
    return angle_BSW.cos(), angle_BSW.sin()


def visible(
    positions_BS: Tensor,
    window: int | None,
    documents_BS: Tensor | None,
    valid_BS: Tensor | None,
    asking_N: Tensor | None = None,
) -> Tensor | None:
    """Which key (last dim) each query sees (B, S, S); None for plain causal attention.

    A token always sees itself, padding too: an empty row would be a mean over nothing.

    asking_N: the tokens of the sequence whose queries there are, (B, N, S), which are told in any
    case; None: all of them.
    """
    if window is None and documents_BS is None and valid_BS is None and asking_N is None:
        return None

    def asking(x_BS: Tensor) -> Tensor:
        return x_BS if asking_N is None else x_BS.index_select(1, asking_N)

    place_1S = torch.arange(positions_BS.shape[1], device=positions_BS.device).unsqueeze(0)
    query_1N1 = asking(place_1S).unsqueeze(2)
    # The order among equal positions (padding) is kept by the lower triangle.
    sees = place_1S <= query_1N1
    if window is not None:
        sees = sees & (asking(positions_BS).unsqueeze(2) - positions_BS.unsqueeze(1) < window)
    if documents_BS is not None:
        sees = sees & (asking(documents_BS).unsqueeze(2) == documents_BS.unsqueeze(1))
    if valid_BS is not None:
        sees = sees & (valid_BS.unsqueeze(1) | (place_1S == query_1N1))
    return sees


class RoutingRecord(NamedTuple):
    """What one depth router decided.

    scores_BS: its scores. chosen_BS: who took part. predictor_BS: the predictor's logits, None
    where there is no predictor. valid_BS: False for padding; None: all are valid. quantile: the
    score above which the wanted share of the batch lies, where the router keeps a running mean.
    """

    scores_BS: Tensor
    chosen_BS: Tensor
    predictor_BS: Tensor | None = None
    valid_BS: Tensor | None = None
    quantile: Tensor | None = None


class ExpertRecord(NamedTuple):
    """What one mixture of experts did with its tokens.

    load_E: share of all choices that fell on each expert, no-op experts last; sums to 1.
    executed_E: tokens that each expert computed, without no-ops; what was dropped is not in it.
    dropped: share of the choices of computing experts that found no room.
    quantile_E: expert choice's score above which an expert takes a token; None for token choice.
    balance_loss, z_loss: unweighted; None where the configuration has none.
    """

    load_E: Tensor
    executed_E: Tensor
    dropped: Tensor
    quantile_E: Tensor | None = None
    balance_loss: Tensor | None = None
    z_loss: Tensor | None = None


class Output(NamedTuple):
    """What a part of the model gives: an update, or the residual stream after a layer.

    received_BS: mean attention that each token received, where the next layer routes by it.
    """

    value_BSD: Tensor
    routing: tuple[RoutingRecord, ...] = ()
    experts: tuple[ExpertRecord, ...] = ()
    received_BS: Tensor | None = None


class SequenceModule(Protocol):
    """Anything that maps (B, S, D) to an update of the same shape can be routed.

    It returns the update alone, f(x), not x + f(x), as a tensor or with what else there is to tell.
    """

    def __call__(self, x_BSD: Tensor, context: SequenceContext) -> Tensor | Output:
        """Return the update (B, S, D)."""
        ...


def as_output(found: Tensor | Output) -> Output:
    """Give a module's bare tensor the shape that everything else has."""
    return Output(found) if isinstance(found, Tensor) else found
