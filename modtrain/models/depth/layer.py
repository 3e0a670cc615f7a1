"""Mixture-of-Depths: a sequence module that only some tokens of each sequence enter.

Shapes: B batch, S sequence, D model, K places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modtrain.models.depth.compute_budget import Dial
from modtrain.models.depth.config import TRAINING_SELECTIONS, RouterConfig, Selection
from modtrain.models.depth.pattern import num_chosen
from modtrain.models.depth.router import (
    Gate,
    Predictor,
    evenly_spaced,
    every_so_many,
    make_router,
    scattered,
    so_many,
    widened,
)
from modtrain.models.depth.selection import (
    Places,
    expert_choice,
    first_places,
    places_of,
    quantile,
    token_choice,
    within,
)
from modtrain.models.sequence import Output, RoutingRecord, SequenceContext, as_output


class Residual(nn.Module):
    """x + f(x): a sequence module that every token enters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self,
        x_BSD: Tensor,
        context: SequenceContext,
        capacity: float | None = None,
        received_BS: Tensor | None = None,
    ) -> Output:
        """Return the residual stream after the module."""
        del capacity, received_BS
        found = as_output(self.module(x_BSD, context))
        return found._replace(value_BSD=x_BSD + found.value_BSD)


class MixtureOfDepths(nn.Module):
    """x_i + g_i f(X)_i for the chosen tokens X, x_i unchanged for the rest (arXiv 2404.02258).

    Where the configuration wants a threshold, the buffers ``threshold_sum`` and
    ``threshold_weight`` hold a running mean of the scores' quantile. A forward pass leaves them
    alone: `observe` and `absorb` move them, once an optimizer step.
    """

    threshold_sum: Tensor
    threshold_weight: Tensor

    def __init__(
        self,
        module: nn.Module,
        config: RouterConfig,
        capacity: float,
        d_model: int,
        eps: float,
        number: int = 0,
    ) -> None:
        """Wrap ``module``, a `SequenceModule` of width ``d_model``, at this capacity.

        number: the router's place among those of the model.
        """
        super().__init__()
        self.module, self.config, self.capacity = module, config, capacity
        self.number = number
        self.router = make_router(config, d_model, eps)
        self.gate = Gate(config, eps)
        if self.router is not None and self.gate.kind == "none":
            # On no path to the loss, unless the auxiliary one makes one. Eager and compiled differ
            # in whether such a parameter has a gradient of zeros, with which it would still decay.
            self.router.requires_grad_("auxiliary" in config.causal_routers)
        wanted = "predictor" in config.causal_routers
        self.predictor = Predictor(d_model, config.predictor_dim, eps) if wanted else None
        if config.keeps_threshold:
            for name in ("threshold_sum", "threshold_weight"):
                self.register_buffer(name, torch.zeros((), dtype=torch.float32))

    def forward(
        self,
        x_BSD: Tensor,
        context: SequenceContext,
        capacity: float | None = None,
        received_BS: Tensor | None = None,
    ) -> Output:
        """Return the residual stream after the layer, and what was decided.

        capacity: in place of the layer's own, where it follows a schedule. received_BS: the
        attention that each token received in the layer before, for routers that go by it.
        """
        self._check(context.selection)
        share = self.capacity if capacity is None else capacity
        count = num_chosen(share, context.positions_BS.shape[1])
        scores_BS = self._scores(x_BSD, context, count, received_BS)
        predictor_BS = self._predicted(x_BSD, context)
        places, chosen_BS = self._choose(scores_BS, predictor_BS, share, context)
        trains = context.selection in TRAINING_SELECTIONS
        record = RoutingRecord(
            scores_BS,
            chosen_BS,
            predictor_BS,
            context.valid_BS,
            quantile(scores_BS, count, context.valid_BS)
            if trains and self.config.keeps_threshold
            else None,
        )
        if places is None:
            return Output(x_BSD, routing=(record,))
        found = self._route(x_BSD, context, scores_BS, places)
        return found._replace(routing=(record, *found.routing))

    @property
    def keeps_state(self) -> bool:
        """Whether `observe` and `absorb` have anything to do."""
        return self.config.keeps_threshold

    def threshold(self) -> Tensor:
        """The score above which a token takes part, a scalar; 0 before anything was learned."""
        return self.threshold_sum / self.threshold_weight.clamp(min=1e-12)

    def level(self, selection: Selection) -> Tensor | float:
        """What `value` has to exceed for a token to take part, as trained."""
        return self.threshold() if selection == "threshold" else 0.0

    def value(self, selection: Selection, scores_BS: Tensor, predictor_BS: Tensor | None) -> Tensor:
        """Return what a causal decision goes by (B, S): scores, or the predictor's logits.

        Raises:
            ValueError: the model was built without that decision.
        """
        self._check(selection)
        if selection == "predictor" and predictor_BS is not None:
            return predictor_BS
        return scores_BS

    def observe(self, record: RoutingRecord) -> Tensor | None:
        """Return what `absorb` wants to know of a micro-batch; None where there is nothing."""
        return record.quantile

    @torch.no_grad()
    def absorb(self, observed: Tensor) -> None:
        """Take in a step's quantile, a mean over micro-batches and ranks."""
        decay = self.config.threshold_decay
        # A batch of padding alone has nothing to say.
        observed = torch.where(observed.isfinite(), observed, self.threshold())
        self.threshold_sum.lerp_(observed.to(self.threshold_sum.dtype), 1 - decay)
        self.threshold_weight.lerp_(torch.ones_like(self.threshold_weight), 1 - decay)

    def _check(self, selection: Selection) -> None:
        config = self.config
        known = ["top_k", "token"] if config.choice == "token" else ["top_k"]
        known += config.causal_routers if config.needs_causal else ["causal"]
        if selection not in known:
            raise ValueError(
                f"this model cannot choose by {selection!r}: it was built with"
                f" router.choice={config.choice}, router.causal={config.causal_routers}"
            )

    # What follows is told apart so that ranks that have shares of a sequence can choose together.

    def _predicted(self, x_BSD: Tensor, context: SequenceContext) -> Tensor | None:
        del context
        return None if self.predictor is None else self.predictor(x_BSD)

    def _scores(
        self, x_BSD: Tensor, context: SequenceContext, count: int, received_BS: Tensor | None
    ) -> Tensor:
        if self.router is not None:
            scores: Tensor = self.router(x_BSD)
            return scores
        if self.config.score == "fixed":
            scores_BS = evenly_spaced(x_BSD, count)
            # Where a sequence ends is not known: who is chosen by position has 1, as in training.
            trains = context.selection in TRAINING_SELECTIONS
            return scores_BS if trains else torch.ones_like(scores_BS)
        if not self.config.needs_scores(context.selection):
            return x_BSD.new_zeros(x_BSD.shape[:2])
        if self.config.score == "attention":
            if received_BS is None:
                raise ValueError("the layer before does not tell what attention it received")
            return received_BS
        with torch.no_grad():
            update_BSD = as_output(self.module(x_BSD, context)).value_BSD
            size_BS: Tensor = torch.linalg.vector_norm(widened(update_BSD), dim=-1)
            return size_BS

    def _choose(
        self,
        scores_BS: Tensor,
        predictor_BS: Tensor | None,
        share: float,
        context: SequenceContext,
    ) -> tuple[Places | None, Tensor]:
        """Return the places to compute (None: there are none), and who takes part (B, S)."""
        count = num_chosen(share, scores_BS.shape[1])
        if context.selection == "top_k":
            if not self.config.needs_causal:
                # A document's share depends on where it ends: these choices are to know nothing.
                context = context._replace(documents_BS=None)
            places = expert_choice(scores_BS, count, context)
            source = True if places.filled_BK is None else places.filled_BK
            nobody_BS = torch.zeros_like(scores_BS, dtype=torch.bool)
            return places, nobody_BS.scatter(1, places.index_BK, source)
        if context.selection == "token":
            room = self.config.places(count, scores_BS.shape[1])
            threshold, is_known = self.threshold(), self.threshold_weight > 0
            chosen_BS = token_choice(scores_BS, count, room, threshold, is_known, context.valid_BS)
        else:
            chosen_BS = self._choose_causally(scores_BS, predictor_BS, share, context)
            # The number is read on the host, which is why training does not come this way.
            counts = chosen_BS.sum(dim=1).tolist()
            if context.cache is not None:
                return places_of(chosen_BS, counts), chosen_BS
            # One place at least, if only for nobody: what is inside leaves its records.
            room = max(1, *counts)
        index_BK = first_places(chosen_BS, room)
        return Places(index_BK, chosen_BS.gather(1, index_BK)), chosen_BS

    def _choose_causally(
        self,
        scores_BS: Tensor,
        predictor_BS: Tensor | None,
        share: float,
        context: SequenceContext,
    ) -> Tensor:
        """Return who takes part (B, S), within what the dial allows."""
        selection, dial = context.selection, context.dial or Dial()
        moved = None if dial.levels is None else dial.levels[self.number]
        if self.config.needs_causal:
            level = self.level(selection) if moved is None else moved
            chosen_BS = self.value(selection, scores_BS, predictor_BS) > level
        else:
            share = share if moved is None else moved
            positions_BS = context.positions_BS.expand_as(scores_BS)
            if self.config.score == "fixed":
                chosen_BS = every_so_many(positions_BS, share)
            else:
                chosen_BS = scattered(positions_BS, share, self.number)
        if context.valid_BS is not None:
            chosen_BS = chosen_BS & context.valid_BS
        if dial.step_cap is not None:
            entered_BS = context.entered_BS
            if entered_BS is None:
                entered_BS = torch.zeros_like(chosen_BS, dtype=torch.long)
            chosen_BS = chosen_BS & (entered_BS < dial.step_cap)
        taken = context.taken[self.number] if context.taken else None
        if dial.layer_cap is not None:
            # Of the tokens so far, those before the cache's end included.
            allowed_BS = so_many(context.positions_BS.expand_as(chosen_BS) + 1, dial.layer_cap)
            before_B = [0] if taken is None else [taken.store.lengths[row] for row in taken.rows]
            taken_B1 = torch.tensor(before_B, device=chosen_BS.device).unsqueeze(1)
            # More than are allowed may have taken part, under another dial.
            chosen_BS = within(chosen_BS, torch.maximum(allowed_BS, taken_B1), taken_B1)
        if taken is not None:
            counts = chosen_BS.sum(dim=1).tolist()
            index_BK = first_places(chosen_BS, max(counts))
            positions_BK = context.positions_BS.gather(1, index_BK)
            taken._replace(counts=counts).append((), positions_BK, None)
        return chosen_BS

    def _route(
        self, x_BSD: Tensor, context: SequenceContext, scores_BS: Tensor, places: Places
    ) -> Output:
        """Gather the chosen, update them, put them back; the others' bits stay as they are."""
        batch, length, dim = x_BSD.shape
        index_BK, filled_BK = places.index_BK, places.filled_BK
        # Rows of the flattened batch: selecting and adding whole rows is several times faster than
        # gather and scatter with an index spread over the features.
        if places.rows is None or places.counts is None:
            number_B = torch.arange(batch, device=x_BSD.device)
        else:
            number_B = torch.tensor(places.rows, device=x_BSD.device)
            context = context.of(places.rows, places.counts)
            scores_BS = scores_BS.index_select(0, number_B)
        row_N = (index_BK + number_B.unsqueeze(1) * length).flatten()
        chosen_BKD = x_BSD.reshape(-1, dim).index_select(0, row_N).view(len(number_B), -1, dim)
        if context.cache is None or length > 1:
            context = context.gather(index_BK, filled_BK)
        found = self._update(chosen_BKD, context, scores_BS.gather(1, index_BK), filled_BK)
        update_ND = found.value_BSD.reshape(-1, dim)
        out_ND = x_BSD.reshape(-1, dim).index_add(0, row_N, update_ND)
        return found._replace(value_BSD=out_ND.view_as(x_BSD))

    def _update(
        self,
        chosen_BKD: Tensor,
        context: SequenceContext,
        scores_BK: Tensor,
        filled_BK: Tensor | None,
    ) -> Output:
        """Return the gated updates of the chosen, in the residual stream's type."""
        found = as_output(self.module(chosen_BKD, context))
        update_BKD = found.value_BSD
        factor_BK = self.gate(scores_BK, chosen_BKD)
        if factor_BK is not None:
            update_BKD = update_BKD * factor_BK.unsqueeze(-1)
        if filled_BK is not None:
            # Adding minus zero changes no bit, that of a zero's sign included.
            update_BKD = update_BKD.where(filled_BK.unsqueeze(-1), -0.0)
        # Autocast leaves the update narrower, or the gate wider, than the residual stream. What a
        # part of the tokens received says nothing to a router behind.
        return found._replace(value_BSD=update_BKD.to(chosen_BKD.dtype), received_BS=None)


class SplitLayer(nn.Module):
    """A layer whose attention and MLP are routed apart, or one of them alone.

    attention, mlp: each a `Residual` or a `MixtureOfDepths`.
    """

    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp

    def forward(
        self,
        x_BSD: Tensor,
        context: SequenceContext,
        capacity: float | None = None,
        received_BS: Tensor | None = None,
    ) -> Output:
        """Return the residual stream after both."""
        attended: Output = self.attention(x_BSD, context, capacity, received_BS)
        context = context.after(attended.routing)
        fed: Output = self.mlp(attended.value_BSD, context, capacity, received_BS)
        return Output(
            fed.value_BSD,
            attended.routing + fed.routing,
            attended.experts + fed.experts,
            attended.received_BS,
        )


def predictor_loss(records: tuple[RoutingRecord, ...]) -> Tensor | None:
    """Mean binary cross-entropy of the predictors against who was chosen; None without any."""
    return _mean_cross_entropy([(r, r.predictor_BS) for r in records if r.predictor_BS is not None])


def auxiliary_loss(records: tuple[RoutingRecord, ...]) -> Tensor | None:
    """The same with the scores as logits: centres their sigmoid on 1/2 (section 3.5)."""
    return _mean_cross_entropy([(r, r.scores_BS) for r in records])


def _mean_cross_entropy(guesses: list[tuple[RoutingRecord, Tensor]]) -> Tensor | None:
    losses = []
    for record, logits_BS in guesses:
        target_BS = record.chosen_BS.to(logits_BS.dtype)
        loss_BS = F.binary_cross_entropy_with_logits(logits_BS, target_BS, reduction="none")
        if record.valid_BS is None:
            losses.append(loss_BS.mean())
        else:
            valid_BS = record.valid_BS.expand_as(loss_BS)
            losses.append(loss_BS.where(valid_BS, 0).sum() / valid_BS.sum().clamp(min=1))
    return torch.stack(losses).mean() if losses else None
