"""Mixture-of-Depths: a sequence module that only some tokens of each sequence enter.

Shapes: B batch, S sequence, D model, K chosen.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modtrain.models.attention import SequenceContext
from modtrain.models.pattern import num_chosen
from modtrain.models.router import LinearRouter, Predictor, top_k

Selection = Literal["top_k", "predictor"]
"""Who takes part. ``top_k`` looks at the whole sequence, the future included, and is what training
uses; ``predictor`` decides on each token by itself, as sampling has to."""


class SequenceModule(Protocol):
    """Anything that maps (B, S, D) to an update of the same shape can be routed."""

    def __call__(self, x_BSD: Tensor, context: SequenceContext) -> Tensor:
        """Return the update (B, S, D)."""
        ...


class RoutingRecord(NamedTuple):
    """What one routed layer decided.

    scores_BS: the router's scores. chosen_BS: who took part. predictor_BS: the predictor's logits,
    None where there is no predictor.
    """

    scores_BS: Tensor
    chosen_BS: Tensor
    predictor_BS: Tensor | None


class MixtureOfDepths(nn.Module):
    """x_i + r_i f(X)_i for the chosen tokens X, x_i unchanged for the rest (arXiv 2404.02258)."""

    def __init__(
        self,
        module: nn.Module,
        router: LinearRouter,
        predictor: Predictor | None,
        capacity: float,
        gated: bool = True,
    ) -> None:
        """Wrap ``module``, a `SequenceModule`; ``gated=False`` leaves r_i out (a control)."""
        super().__init__()
        self.module, self.router, self.predictor = module, router, predictor
        self.capacity, self.gated = capacity, gated

    def forward(
        self, x_BSD: Tensor, context: SequenceContext, selection: Selection = "top_k"
    ) -> tuple[Tensor, RoutingRecord]:
        """Return the residual stream after the layer, and what was decided."""
        scores_BS = self.router(x_BSD)
        predictor_BS = None if self.predictor is None else self.predictor(x_BSD)
        if selection == "top_k":
            index_BK = top_k(scores_BS, num_chosen(self.capacity, x_BSD.shape[1]))
            chosen_BS = torch.zeros_like(scores_BS, dtype=torch.bool).scatter(1, index_BK, True)
            out_BSD = self._route(x_BSD, context, scores_BS, index_BK)
            return out_BSD, RoutingRecord(scores_BS, chosen_BS, predictor_BS)
        if predictor_BS is None:
            raise ValueError("this model has no predictor: it was built without router.causal")
        chosen_BS = predictor_BS > 0
        out_BSD = self._route_ragged(x_BSD, context, scores_BS, chosen_BS)
        return out_BSD, RoutingRecord(scores_BS, chosen_BS, predictor_BS)

    def _route(
        self, x_BSD: Tensor, context: SequenceContext, scores_BS: Tensor, index_BK: Tensor
    ) -> Tensor:
        """Gather the chosen, update them, put them back; the others' bits stay as they are."""
        batch, length, dim = x_BSD.shape
        # Rows of the flattened batch: selecting and adding whole rows is several times faster than
        # gather and scatter with an index spread over the features.
        start_B1 = torch.arange(batch, device=x_BSD.device).unsqueeze(1) * length
        row_N = (index_BK + start_B1).flatten()
        chosen_BKD = x_BSD.reshape(-1, dim).index_select(0, row_N).view(batch, -1, dim)
        update_BKD = self.module(chosen_BKD, context.gather(index_BK))
        if self.gated:
            update_BKD = update_BKD * scores_BS.gather(1, index_BK).unsqueeze(-1)
        # Autocast leaves the update narrower, or the gate wider, than the residual stream.
        update_ND = update_BKD.to(x_BSD.dtype).reshape(-1, dim)
        return x_BSD.reshape(-1, dim).index_add(0, row_N, update_ND).view_as(x_BSD)

    def _route_ragged(
        self, x_BSD: Tensor, context: SequenceContext, scores_BS: Tensor, chosen_BS: Tensor
    ) -> Tensor:
        """Update the chosen, of which each sequence may have another number.

        The chosen come first, in order, then others as padding up to the longest sequence: under
        causal attention what stands behind is never seen, so no mask is needed. The number is read
        on the host, which is why training does not come this way.
        """
        longest = int(chosen_BS.sum(dim=1).max().item())
        if longest == 0:
            return x_BSD
        order_BS = torch.argsort(chosen_BS.logical_not().byte(), dim=1, stable=True)
        updated_BSD = self._route(x_BSD, context, scores_BS, order_BS[:, :longest])
        return torch.where(chosen_BS.unsqueeze(-1), updated_BSD, x_BSD)


def predictor_loss(records: tuple[RoutingRecord, ...]) -> Tensor | None:
    """Mean binary cross-entropy of the predictors against who was chosen; None without any."""
    losses = [
        F.binary_cross_entropy_with_logits(
            record.predictor_BS, record.chosen_BS.to(record.predictor_BS.dtype)
        )
        for record in records
        if record.predictor_BS is not None
    ]
    return torch.stack(losses).mean() if losses else None
