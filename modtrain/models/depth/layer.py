"""Mixture-of-Depths: a router in front of a module that only some tokens of each sequence enter.

Shapes: B batch, S sequence, D model, K slots for routed tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from modtrain.models.depth.config import TRAINING_SELECTIONS, ComputeBudget, RouterConfig, Selection
from modtrain.models.depth.pattern import num_chosen
from modtrain.models.depth.router import (
    Gate,
    Predictor,
    evenly_spaced_positions,
    evenly_spaced_scores,
    hash_positions,
    hashed_scores,
    make_router,
    to_fp32_or_wider,
    update_sums,
)
from modtrain.models.depth.selection import (
    TokenSlots,
    apply_budget,
    chosen_first,
    expert_choice,
    filled_slots,
    quantile,
    token_choice,
)
from modtrain.models.depth.swap import mean_gate, swap_choice
from modtrain.models.sequence import (
    Output,
    RoutingRecord,
    SequenceContext,
    as_output,
    sequence_context,
)

BARE_ROUTER = RouterConfig(input_norm=True, gate_multiplier=0.1, gate_offset=1.0)
"""The router of a layer that is wrapped without a configuration: linear, with a causal predictor.

The gate is 1 plus a tenth of the score. A raw score as the gate, as in arXiv 2404.02258, has the
scale of the features: on small ones it lets next to nothing pass, until the router has learned.
"""
_WITH_RESIDUAL = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class MixtureOfDepths(nn.Module):
    """x_i + g_i f(X)_i for the chosen tokens X, x_i unchanged for the rest (arXiv 2404.02258).

    Any module from (B, S, D) to (B, S, D) can be routed. If its forward has a parameter
    ``context``, it is given the `SequenceContext` of the chosen tokens, and may return an `Output`
    with records; else it is called with their features alone::

        layer = MixtureOfDepths(nn.TransformerEncoderLayer(64, 4, batch_first=True), 64,
                                capacity=0.25)
        output = layer(x_BSD)  # output.value_BSD: the residual stream; output.routing: the record
        loss = task_loss(output.value_BSD) + predictor_loss(output.routing)

    If the configuration needs a threshold, the buffers ``threshold_sum`` and ``threshold_weight``
    hold a running mean of the scores' quantile. A forward pass leaves them unchanged: call
    `batch_stats` and `update_running_stats` once per optimizer step.
    """

    threshold_sum: Tensor
    threshold_weight: Tensor

    def __init__(
        self,
        module: nn.Module,
        d_model: int,
        capacity: float = 0.125,
        config: RouterConfig | None = None,
        *,
        eps: float = 1e-5,
        number: int = 0,
        includes_residual: bool | None = None,
    ) -> None:
        """Wrap ``module``.

        d_model: width D of its input and output. capacity: share of the tokens to route, in (0, 1].
        config: None: `BARE_ROUTER`, whose gates begin near 1 whatever the scale of ``x_BSD``. eps:
        of the norms in routers. number: index among the routers of the model. includes_residual:
        the module returns x + f(x) instead of the update f(x); None: torch's own transformer
        layers do, others do not.

        Raises:
            ValueError: ``capacity`` is not in (0, 1], or the module has no ``keys_values`` to keep.
        """
        super().__init__()
        if not 0 < capacity <= 1:
            raise ValueError(f"capacity={capacity} is not a share of the tokens in (0, 1]")
        config = BARE_ROUTER if config is None else config
        if includes_residual is None:
            includes_residual = isinstance(module, _WITH_RESIDUAL)
        if config.keep_kv and not hasattr(module, "keys_values"):
            raise ValueError(f"router.keep_kv: {type(module).__name__} has no method keys_values")
        self.module, self.config, self.capacity = module, config, capacity
        self.number, self.includes_residual = number, includes_residual
        self.takes_context = "context" in inspect.signature(module.forward).parameters
        self.router = make_router(config, d_model, eps)
        self.gate = Gate(config, eps)
        if self.router is not None and self.gate.kind == "none":
            # Only the auxiliary loss can give it a gradient. Eager and compiled modes differ in
            # whether an unused parameter gets a gradient of zeros, and weight decay would apply.
            self.router.requires_grad_("auxiliary" in config.causal_routers)
        has_predictor = "predictor" in config.causal_routers
        self.predictor = Predictor(d_model, config.predictor_dim, eps) if has_predictor else None
        if config.has_threshold:
            for name in ("threshold_sum", "threshold_weight"):
                self.register_buffer(name, torch.zeros((), dtype=torch.float32))

    def forward(self, x_BSD: Tensor, context: SequenceContext | None = None) -> Output:
        """Return the residual stream after the layer, and the routing decisions.

        context: None: whole sequences without padding. Tokens are then selected as in training
        where ``self.training`` is set, else by the first causal decision.

        Raises:
            ValueError: the layer was built without the selection that the context asks for, or the
                module needs a context and there is none.
        """
        context = self._default_context(x_BSD) if context is None else context
        self._check(context.selection)
        capacity = self.capacity if context.capacity is None else context.capacity
        count = num_chosen(capacity, context.positions_BS.shape[1])
        scores_BS = self._scores(x_BSD, context, count)
        predictor_BS = self._predicted(x_BSD, context)
        slots, chosen_BS = self._choose(scores_BS, predictor_BS, capacity, context)
        level = None
        if context.selection in TRAINING_SELECTIONS and self.config.has_threshold:
            level = quantile(scores_BS, count, context.valid_BS)
        record = RoutingRecord(scores_BS, chosen_BS, predictor_BS, context.valid_BS, level)
        if self.config.keep_kv:
            # Even if no token is chosen: the cache needs them for later ones.
            module: Any = self.module
            context = context._replace(keys_values=module.keys_values(x_BSD, context))
        if slots is None:
            return Output(x_BSD, routing=(record,))
        swap = context.swap
        if swap is not None and (swap.routers is None or self.number in swap.routers):
            return self._swapped(x_BSD, context, record, slots)
        return _with_record(self._route(x_BSD, context, scores_BS, slots), record)

    def _swapped(
        self, x_BSD: Tensor, context: SequenceContext, record: RoutingRecord, slots: TokenSlots
    ) -> Output:
        """Return the output with another choice of tokens; see `RouterSwap`."""
        swap = context.swap
        if swap is None or context.cache is not None:
            raise ValueError("a choice is swapped for whole sequences, without a cache")
        if swap.choice == "zero":
            output = self._route(x_BSD, context, record.scores_BS, slots)
            return _with_record(output, record).with_value(x_BSD)
        if swap.mean_gate:
            gate_BS = self.gate(record.scores_BS, x_BSD)
            if gate_BS is not None:
                context = context._replace(gate_B1=mean_gate(gate_BS, record.chosen_BS))
        norm_BS = self._update_norms(x_BSD, context) if swap.choice == "update_norm" else None
        record = swap_choice(swap, record, norm_BS)
        index_BK = chosen_first(record.chosen_BS, slots.index_BK.shape[1])
        slots = TokenSlots(index_BK, record.chosen_BS.gather(1, index_BK))
        return _with_record(self._route(x_BSD, context, record.scores_BS, slots), record)

    @property
    def has_running_stats(self) -> bool:
        """Whether `update_running_stats` changes anything."""
        return self.config.has_threshold

    def threshold(self) -> Tensor:
        """The running quantile of the scores, a scalar; 0 before the first update."""
        return self.threshold_sum / self.threshold_weight.clamp(min=1e-12)

    def decision_threshold(
        self, selection: Selection, budget: ComputeBudget | None = None
    ) -> Tensor | float:
        """The value that `decision_values` have to exceed: the budget's, or as trained."""
        if budget is not None and budget.thresholds is not None:
            return budget.thresholds[self.number]
        return self.threshold() if selection == "threshold" else 0.0

    def decision_values(
        self, selection: Selection, scores_BS: Tensor, predictor_BS: Tensor | None
    ) -> Tensor:
        """Return the values (B, S) of a causal decision: scores, or the predictor's logits.

        Raises:
            ValueError: the layer was built without that decision.
        """
        self._check(selection)
        if selection == "predictor" and predictor_BS is not None:
            return predictor_BS
        return scores_BS

    def batch_stats(self, record: RoutingRecord) -> Tensor | None:
        """Return the quantile of a micro-batch for `update_running_stats`; None if unused."""
        return record.quantile

    @torch.no_grad()
    def update_running_stats(self, batch_quantile: Tensor) -> None:
        """Update the threshold by a step's quantile, a mean over micro-batches and ranks."""
        decay = self.config.threshold_decay
        # The quantile of a batch of padding only is not finite.
        batch_quantile = torch.where(batch_quantile.isfinite(), batch_quantile, self.threshold())
        self.threshold_sum.lerp_(batch_quantile.to(self.threshold_sum.dtype), 1 - decay)
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

    def _default_context(self, x_BSD: Tensor) -> SequenceContext:
        if self.takes_context:
            name = type(self.module).__name__
            raise ValueError(f"{name} takes a SequenceContext: pass context=sequence_context(…)")
        config = self.config
        causal: list[Selection] = config.causal_routers if config.needs_causal else ["causal"]
        selection: Selection = "token" if config.choice == "token" else "top_k"
        if not self.training:
            if not causal:
                raise ValueError("router.causal=[] has no causal decision for evaluation mode")
            selection = causal[0]
        positions_1S = torch.arange(x_BSD.shape[1], device=x_BSD.device).unsqueeze(0)
        return sequence_context(positions_1S, 0, 1.0, selection=selection)

    # Separate methods, which context parallelism overrides.

    def _predicted(self, x_BSD: Tensor, context: SequenceContext) -> Tensor | None:
        del context
        return None if self.predictor is None else self.predictor(x_BSD)

    def _scores(self, x_BSD: Tensor, context: SequenceContext, count: int) -> Tensor:
        trains = context.selection in TRAINING_SELECTIONS
        if self.config.score == "random" and not trains:
            return hashed_scores(context.positions_BS.expand(x_BSD.shape[:2]), self.number)
        if self.router is not None:
            scores: Tensor = self.router(x_BSD)
            return scores
        if self.config.score == "fixed":
            scores_BS = evenly_spaced_scores(x_BSD, count)
            # In decoding the length is unknown: tokens chosen by position score 1, as in training.
            return scores_BS if trains else torch.ones_like(scores_BS)
        if not self.config.needs_scores(context.selection):
            return x_BSD.new_zeros(x_BSD.shape[:2])
        if self.config.score == "attention":
            if context.received_BS is None:
                raise ValueError(
                    "router.score=attention needs the attention received in the layer before"
                )
            return context.received_BS
        return self._update_norms(x_BSD, context)

    @torch.no_grad()
    def _update_norms(self, x_BSD: Tensor, context: SequenceContext) -> Tensor:
        """Return the norms (B, S) of the updates that the whole sequence would get, ungated."""
        update_BSD = self._module_update(x_BSD, context).value_BSD
        norm_BS: Tensor = torch.linalg.vector_norm(to_fp32_or_wider(update_BSD), dim=-1)
        return norm_BS

    def _choose(
        self,
        scores_BS: Tensor,
        predictor_BS: Tensor | None,
        capacity: float,
        context: SequenceContext,
    ) -> tuple[TokenSlots | None, Tensor]:
        """Return the slots to compute (None: no token is routed), and the routed tokens (B, S)."""
        count = num_chosen(capacity, scores_BS.shape[1])
        if context.selection == "top_k":
            if not self.config.needs_causal:
                # A document's share depends on where it ends, which these choices must not know.
                context = context._replace(documents_BS=None)
            slots = expert_choice(scores_BS, count, context)
            source = True if slots.slot_mask_BK is None else slots.slot_mask_BK
            false_BS = torch.zeros_like(scores_BS, dtype=torch.bool)
            return slots, false_BS.scatter(1, slots.index_BK, source)
        if context.selection == "token":
            num_slots = self.config.num_slots(count, scores_BS.shape[1])
            threshold, is_known = self.threshold(), self.threshold_weight > 0
            chosen_BS = token_choice(
                scores_BS, count, num_slots, threshold, is_known, context.valid_BS
            )
        else:
            chosen_BS = self._choose_causally(scores_BS, predictor_BS, capacity, context)
            # Waits for the device: training does not use this path.
            counts = chosen_BS.sum(dim=1).tolist()
            if context.cache is not None:
                return filled_slots(chosen_BS, counts), chosen_BS
            # At least one slot, if only padding: the inner module has to return its records.
            num_slots = max(1, *counts)
        index_BK = chosen_first(chosen_BS, num_slots)
        return TokenSlots(index_BK, chosen_BS.gather(1, index_BK)), chosen_BS

    def _choose_causally(
        self,
        scores_BS: Tensor,
        predictor_BS: Tensor | None,
        capacity: float,
        context: SequenceContext,
    ) -> Tensor:
        """Return the routed tokens (B, S), within the compute budget."""
        selection, budget = context.selection, context.budget or ComputeBudget()
        if self.config.needs_causal:
            threshold = self.decision_threshold(selection, budget)
            chosen_BS = self.decision_values(selection, scores_BS, predictor_BS) > threshold
        else:
            share = capacity if budget.thresholds is None else budget.thresholds[self.number]
            positions_BS = context.positions_BS.expand_as(scores_BS)
            if self.config.score == "fixed":
                chosen_BS = evenly_spaced_positions(positions_BS, share)
            else:
                chosen_BS = hash_positions(positions_BS, share, self.number)
        if context.valid_BS is not None:
            chosen_BS = chosen_BS & context.valid_BS
        return apply_budget(chosen_BS, budget, context, self.number)

    def _route(
        self, x_BSD: Tensor, context: SequenceContext, scores_BS: Tensor, slots: TokenSlots
    ) -> Output:
        """Gather the chosen tokens, update them, put them back; the others stay bit-identical."""
        batch, length, dim = x_BSD.shape
        index_BK, slot_mask_BK = slots.index_BK, slots.slot_mask_BK
        # Rows of the flattened batch: selecting and adding whole rows is several times faster than
        # gather and scatter with an index spread over the features.
        if slots.rows is None:
            number_B = torch.arange(batch, device=x_BSD.device)
        else:
            number_B = torch.tensor([*slots.rows], device=x_BSD.device)
            context = context.select_rows([*slots.rows], [*slots.rows.values()])
            scores_BS = scores_BS.index_select(0, number_B)
        row_N = (index_BK + number_B.unsqueeze(1) * length).flatten()
        chosen_BKD = x_BSD.reshape(-1, dim).index_select(0, row_N).view(len(number_B), -1, dim)
        if context.cache is None or length > 1:
            context = context.gather(index_BK, slot_mask_BK)
        output = self._update(chosen_BKD, context, scores_BS.gather(1, index_BK), slot_mask_BK)
        update_ND = output.value_BSD.reshape(-1, dim)
        out_ND = x_BSD.reshape(-1, dim).index_add(0, row_N, update_ND)
        return output.with_value(out_ND.view_as(x_BSD))

    def _update(
        self,
        chosen_BKD: Tensor,
        context: SequenceContext,
        scores_BK: Tensor,
        slot_mask_BK: Tensor | None,
    ) -> Output:
        """Return the gated updates of the chosen tokens, in the residual stream's dtype."""
        output = self._module_update(chosen_BKD, context)
        update_BKD = output.value_BSD
        factor_BK = self.gate(scores_BK, chosen_BKD)
        if context.gate_B1 is not None:
            factor_BK = context.gate_B1.expand_as(scores_BK)
        if factor_BK is not None:
            update_BKD = update_BKD * factor_BK.unsqueeze(-1)
        if slot_mask_BK is not None:
            # Adding -0.0 changes no bit; adding 0.0 would change the sign of -0.0.
            update_BKD = update_BKD.where(slot_mask_BK.unsqueeze(-1), -0.0)
        # Autocast leaves the update narrower, or the gate wider, than the residual stream. The
        # attention received among the chosen tokens alone is no signal for the next router.
        output = output.with_value(update_BKD.to(chosen_BKD.dtype))._replace(received_BS=None)
        if context.cache is not None:
            return output
        sums_4 = self._total(update_sums(factor_BK, update_BKD, chosen_BKD, slot_mask_BK))
        return output._replace(update_sums_4=sums_4)

    def _total(self, sums_4: Tensor) -> Tensor:
        """Return sums over all tokens; context parallelism, where each rank has some, overrides."""
        return sums_4

    def _module_update(self, x_BSD: Tensor, context: SequenceContext) -> Output:
        output = as_output(
            self.module(x_BSD, context) if self.takes_context else self.module(x_BSD)
        )
        if self.includes_residual:
            output = output.with_value(output.value_BSD - x_BSD)
        return output


def _with_record(output: Output, record: RoutingRecord) -> Output:
    """Return a routed layer's output with its own record first."""
    # Not by `_replace`, as in `Output.with_value`.
    record = RoutingRecord(*record[:5], output.update_sums_4)
    return Output(output.value_BSD, (record, *output.routing), output.experts, output.received_BS)
