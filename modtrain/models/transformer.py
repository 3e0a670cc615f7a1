"""The language model: embedding, layers (dense or routed), head, loss.

Shapes: B batch, S sequence, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modtrain.models.attention import Attention
from modtrain.models.block import Block
from modtrain.models.cache.cache import Cache, CacheView
from modtrain.models.cache.packing import Packed, packed
from modtrain.models.config import ModelConfig
from modtrain.models.convolution import Convolution
from modtrain.models.depth.compute_budget import Dial
from modtrain.models.depth.config import Selection
from modtrain.models.depth.layer import (
    MixtureOfDepths,
    Residual,
    SplitLayer,
    auxiliary_loss,
    predictor_loss,
)
from modtrain.models.experts.layer import Experts
from modtrain.models.feed_forward import FeedForward
from modtrain.models.init import initialise
from modtrain.models.loss import next_token_loss
from modtrain.models.norm import RMSNorm
from modtrain.models.sequence import (
    ExpertRecord,
    RoutingRecord,
    SequenceContext,
    rotary,
    sequence_context,
)


class ModelOutput(NamedTuple):
    """What a forward pass gives.

    logits_BSV: the next token's logits; None where targets were given.
    loss: mean cross-entropy in nats a token; None without targets.
    auxiliary: further losses to minimise beside it, by name, with their weights.
    routing: one record a depth router, in the order of `Transformer.routers`.
    experts: one record a mixture of experts, in the order of `Transformer.mixtures`.
    """

    logits_BSV: Tensor | None
    loss: Tensor | None
    auxiliary: dict[str, Tensor]
    routing: tuple[RoutingRecord, ...]
    experts: tuple[ExpertRecord, ...]

    def require_logits(self) -> Tensor:
        """Return the logits (B, S, V). Raises ValueError where a loss was asked for instead."""
        if self.logits_BSV is None:
            raise ValueError("a forward pass for a loss has no logits")
        return self.logits_BSV


class Transformer(nn.Module):
    """A causal decoder whose blocks are routed as ``config.pattern`` says."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.capacities = tuple(config.capacities)
        # torch's layers draw weights as they are made, which `initialise` replaces: whoever draws
        # from the global state next is not to notice.
        with torch.random.fork_rng(devices=[]):
            self.embedding = nn.Embedding(config.vocabulary, config.d_model)
            self.layers = nn.ModuleList(_layer(config, i) for i in range(config.num_layers))
            self.norm = RMSNorm(config.d_model, config.norm_eps)
            self.head = nn.Linear(config.d_model, config.vocabulary, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        initialise(self, config, seed)

    @property
    def routers(self) -> list[MixtureOfDepths]:
        """The depth routers, in running order."""
        return [module for module in self.modules() if isinstance(module, MixtureOfDepths)]

    @property
    def mixtures(self) -> list[Experts]:
        """The mixtures of experts, in running order."""
        return [module for module in self.modules() if isinstance(module, Experts)]

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        selection: Selection | None = None,
        *,
        capacities: Sequence[float | None] | None = None,
        documents_BS: Tensor | None = None,
        valid_BS: Tensor | None = None,
        dial: Dial | None = None,
    ) -> ModelOutput:
        """Run the model.

        tokens_BS: token ids. targets_BS: the ids that come next, for the loss; -100 is left out.
        selection: who takes part in what is routed; None: as in training. `Selection` says which
        choices are causal.
        capacities: one a layer, in place of the configuration's, where they follow a schedule.
        documents_BS: numbers of the documents, rising along each sequence: nothing then passes
        between documents, but that the room of token choice and of limited experts, and a cap
        on a layer, are the sequence's. valid_BS: False for padding. dial: how much causal
        decisions are to compute.
        """
        selection = selection or self.config.training_selection
        self._check(dial)
        context = self._context(tokens_BS, selection, documents_BS, valid_BS)
        context = context._replace(dial=dial)
        x_BSD = self.embedding(tokens_BS)
        routing: tuple[RoutingRecord, ...] = ()
        experts: tuple[ExpertRecord, ...] = ()
        received_BS = None
        for layer, capacity in zip(self.layers, capacities or self.capacities, strict=True):
            found = layer(x_BSD, context, capacity, received_BS)
            x_BSD, received_BS = found.value_BSD, found.received_BS
            routing, experts = routing + found.routing, experts + found.experts
            context = context.after(found.routing)
        x_BSD = self.norm(x_BSD)
        if targets_BS is None:
            return ModelOutput(self.head(x_BSD), None, {}, routing, experts)
        loss = self.token_loss(x_BSD, self.head.weight, targets_BS)
        # Under a causal decision that decision would be its own target: no loss to learn from.
        trains = selection == self.config.training_selection
        auxiliary = self._auxiliary(routing, experts) if trains else {}
        return ModelOutput(None, loss, auxiliary, routing, experts)

    @torch.no_grad()
    def extend(
        self,
        tokens_NS: Tensor,
        cache: Cache,
        selection: Selection | None = None,
        *,
        rows: list[int] | None = None,
        dial: Dial | None = None,
        documents_NS: Tensor | None = None,
        valid_NS: Tensor | None = None,
        last_only: bool = False,
    ) -> ModelOutput:
        """Run the next tokens of sequences whose earlier ones ``cache`` holds, and remember them.

        The same logits as those of all the tokens at once. Each routed part is computed for the
        sequences that take part in it, and not at all where none does.

        tokens_NS: the next tokens of the cache's sequences ``rows``, each named once; None: of all.
        selection: a causal decision; None: the first that the model has. documents_NS: numbers of
        the documents, which go on rising from call to call. valid_NS: False for padding, on
        whichever side. last_only: logits (N, 1, V) of each sequence's last token alone.

        Returns logits and the routing; records of experts are left out.

        Raises:
            ValueError: the model has no such decision, or ``rows`` does not fit.
        """
        rows = list(range(cache.batch)) if rows is None else rows
        are_there = len(rows) > 0 and all(0 <= row < cache.batch for row in rows)
        if not are_there or len(rows) != len(tokens_NS) or len(set(rows)) != len(rows):
            raise ValueError(
                f"{len(tokens_NS)} sequences of tokens for the rows {rows} of {cache.batch}"
            )
        self._check(dial)
        counts_taken = len(cache.taken) == len(self.config.routed_parts)
        if dial is not None and dial.layer_cap is not None and not counts_taken:
            raise ValueError("a layer_cap asks for a cache made with counts_taken=True")
        tokens = packed(tokens_NS, valid_NS, documents_NS)
        context = self._cached_context(tokens, cache, self._causal(selection), rows, dial)
        x_NSD = self.embedding(tokens.tokens_NS)
        routing: tuple[RoutingRecord, ...] = ()
        for layer, store in zip(self.layers, cache.layers, strict=True):
            view = CacheView(store, rows, tokens.counts)
            found = layer(x_NSD, context._replace(cache=view))
            x_NSD, routing = found.value_BSD, routing + found.routing
            context = context.after(found.routing)
        cache.advance(rows, tokens.counts)
        x_NSD = tokens.last(x_NSD) if last_only else tokens.unpacked(x_NSD)
        routing = tuple(
            record._replace(
                scores_BS=tokens.unpacked(record.scores_BS),
                chosen_BS=tokens.unpacked(record.chosen_BS),
                predictor_BS=None
                if record.predictor_BS is None
                else tokens.unpacked(record.predictor_BS),
                valid_BS=valid_NS,
            )
            for record in routing
        )
        return ModelOutput(self.head(self.norm(x_NSD)), None, {}, routing, ())

    def token_loss(self, x_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor) -> Tensor:
        """Return the mean cross-entropy of the head's logits, in nats a token.

        A method, so that ranks that have the same tokens can share them out.
        """
        return next_token_loss(x_BSD, weight_VD, targets_BS, self.config.loss_chunk)

    def asking(self, tokens_BS: Tensor) -> Tensor | None:
        """Return the places of the tokens whose queries attention is to answer; None: of all.

        A method, so that ranks can have shares of a sequence.
        """
        del tokens_BS
        return None

    def observe(self, output: ModelOutput) -> list[Tensor]:
        """Return what the running states of routers and experts are to learn from a batch."""
        found: list[Tensor | None] = [
            *(r.observe(record) for r, record in zip(self.routers, output.routing, strict=True)),
            *(m.observe(record) for m, record in zip(self.mixtures, output.experts, strict=True)),
        ]
        return [observed for observed in found if observed is not None]

    def absorb(self, observed: Sequence[Tensor]) -> None:
        """Move the running states: thresholds, biases. Once an optimizer step.

        observed: what `observe` returned, averaged over micro-batches and ranks.
        """
        modules: list[MixtureOfDepths | Experts] = [*self.routers, *self.mixtures]
        keepers = [module for module in modules if module.keeps_state]
        for module, value in zip(keepers, observed, strict=True):
            module.absorb(value)

    def _context(
        self,
        tokens_BS: Tensor,
        selection: Selection,
        documents_BS: Tensor | None,
        valid_BS: Tensor | None,
    ) -> SequenceContext:
        if valid_BS is None:
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).unsqueeze(0)
        else:
            positions_BS = (valid_BS.long().cumsum(dim=1) - 1).clamp(min=0)
        return sequence_context(
            positions_BS,
            self.config.head_width,
            self.config.rope_theta,
            selection=selection,
            window=self.config.sliding_window,
            documents_BS=documents_BS,
            valid_BS=valid_BS,
            asking_N=self.asking(tokens_BS),
        )

    def _check(self, dial: Dial | None) -> None:
        if dial is None or dial.levels is None:
            return
        routers = len(self.config.routed_parts)
        if len(dial.levels) != routers:
            raise ValueError(f"{len(dial.levels)} levels for {routers} routers")

    def _causal(self, selection: Selection | None) -> Selection:
        """Return the causal decision to go by. Raises ValueError where there is none."""
        config, known = self.config, self.config.causal_selections
        chosen = next(iter(known), None) if selection is None else selection
        if chosen is None or chosen not in known:
            raise ValueError(
                f"the model has no causal decision {chosen or ''}: it was trained with"
                f" {', '.join(known) or 'none'}"
            )
        is_oracle = config.is_routed and config.router.score == "oracle_norm"
        if is_oracle and config.router.needs_scores(chosen):
            raise ValueError(
                "router.score=oracle_norm is made of the whole sequence; decide by a predictor,"
                " with router.gate=none"
            )
        return chosen

    def _cached_context(
        self,
        tokens: Packed,
        cache: Cache,
        selection: Selection,
        rows: list[int],
        dial: Dial | None,
    ) -> SequenceContext:
        device = tokens.tokens_NS.device
        seen_N1 = torch.tensor([cache.seen[row] for row in rows], device=device).unsqueeze(1)
        positions_NS = seen_N1 + torch.arange(tokens.tokens_NS.shape[1], device=device)
        cos_NSW, sin_NSW = rotary(positions_NS, self.config.head_width, self.config.rope_theta)
        return SequenceContext(
            positions_NS,
            cos_NSW,
            sin_NSW,
            selection,
            self.config.sliding_window,
            tokens.documents_NS,
            tokens.valid_NS,
            taken=tuple(CacheView(store, rows, tokens.counts) for store in cache.taken),
            dial=dial,
        )

    def _auxiliary(
        self, routing: tuple[RoutingRecord, ...], experts: tuple[ExpertRecord, ...]
    ) -> dict[str, Tensor]:
        router, mixture = self.config.router, self.config.experts
        found = {"predictor": (1.0, predictor_loss(routing))}
        if "auxiliary" in router.causal_routers:
            found["auxiliary"] = (router.auxiliary_weight, auxiliary_loss(routing))
        for name, weight in (
            ("balance_loss", mixture.balance_weight),
            ("z_loss", mixture.z_loss_weight),
        ):
            losses = [getattr(r, name) for r in experts if getattr(r, name) is not None]
            mean = torch.stack(losses).mean() if losses else None
            found[name.removesuffix("_loss")] = (weight, mean)
        return {name: weight * loss for name, (weight, loss) in found.items() if loss is not None}


def is_predictor(name: str) -> bool:
    """Whether the parameter of this name belongs to a predictor, which trains beside the trunk."""
    return ".predictor." in name


def _layer(config: ModelConfig, index: int) -> nn.Module:
    capacity = config.capacities[index]
    attention = _mixer(config, index)
    mlp = Experts(config) if config.has_experts(index) else FeedForward(config)
    if capacity is None:
        return Residual(Block(attention, mlp))

    def routed(module: nn.Module, part: str) -> MixtureOfDepths:
        number = config.routed_parts.index((index, part))
        return MixtureOfDepths(
            module, config.router, capacity, config.d_model, config.norm_eps, number
        )

    target = config.router.target
    if target == "block":
        return routed(Block(attention, mlp), "block")
    return SplitLayer(
        Residual(attention) if target == "mlp" else routed(attention, "attention"),
        Residual(mlp) if target == "attention" else routed(mlp, "mlp"),
    )


def _mixer(config: ModelConfig, index: int) -> nn.Module:
    if config.mixers[index] == "convolution":
        return Convolution(config)
    follows = index + 1 < config.num_layers and config.capacities[index + 1] is not None
    return Attention(config, tells_received=follows and config.router.score == "attention")
