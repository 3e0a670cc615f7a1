"""The language model: embedding, layers (dense or routed), head, loss.

Shapes: B batch, S sequence, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modtrain.models.attention import Attention
from modtrain.models.block import Block, Residual, SplitLayer
from modtrain.models.cache.cache import Cache, CacheView
from modtrain.models.cache.packing import pack
from modtrain.models.config import ModelConfig
from modtrain.models.convolution import Convolution
from modtrain.models.depth.config import ComputeBudget, RouterSwap, Selection
from modtrain.models.depth.layer import MixtureOfDepths
from modtrain.models.depth.losses import auxiliary_loss, predictor_loss
from modtrain.models.depth.router import LinearRouter, MLPRouter
from modtrain.models.experts.layer import Experts
from modtrain.models.feed_forward import FeedForward
from modtrain.models.init import initialise
from modtrain.models.loss import next_token_loss
from modtrain.models.norm import RMSNorm
from modtrain.models.rope.rotary import rotary
from modtrain.models.sequence import (
    ExpertRecord,
    RoutingRecord,
    SequenceContext,
    attention_mask,
)


class ModelOutput(NamedTuple):
    """The result of a forward pass.

    logits_BSV: the next token's logits; None if targets were given.
    loss: mean cross-entropy in nats per token; None without targets.
    auxiliary: further losses to add to it, by name, already weighted.
    routing: one record per depth router, in the order of `Transformer.routers`.
    experts: one record per mixture of experts, in the order of `Transformer.mixtures`.
    """

    logits_BSV: Tensor | None
    loss: Tensor | None
    auxiliary: dict[str, Tensor]
    routing: tuple[RoutingRecord, ...]
    experts: tuple[ExpertRecord, ...]

    def weighted(self, weight: float) -> ModelOutput:
        """Return the same with its losses times ``weight``."""
        auxiliary = {name: weight * loss for name, loss in self.auxiliary.items()}
        loss = None if self.loss is None else weight * self.loss
        return self._replace(loss=loss, auxiliary=auxiliary)

    def require_logits(self) -> Tensor:
        """Return the logits (B, S, V). Raises ValueError if targets were given."""
        if self.logits_BSV is None:
            raise ValueError("a forward pass with targets returns a loss and no logits")
        return self.logits_BSV


class Transformer(nn.Module):
    """A causal decoder whose blocks are routed according to ``config.pattern``."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        # Layers draw initial weights from the global generator when built. `initialise` replaces
        # them, so the generator's state is restored.
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
        is_right_padded: bool = False,
        budget: ComputeBudget | None = None,
        swap: RouterSwap | None = None,
    ) -> ModelOutput:
        """Run the model.

        tokens_BS: token ids. targets_BS: ids of the next tokens, for the loss; -100 is ignored.
        selection: how routers select tokens; None: as in training. See `Selection` for which are
        causal.
        capacities: one per layer, in place of the configuration's, for a capacity schedule; None
        for dense layers.
        documents_BS: document numbers, rising along each sequence. No information then passes
        between documents, except that the capacities of token choice and of experts, and a layer
        cap, apply to the whole sequence.
        valid_BS: False for padding. is_right_padded: padding is at the ends of sequences only.
        Causal attention never reads it there, and needs no mask for it. budget: limits on causal
        decisions. swap: another choice of tokens than the routers', for analysis.
        """
        selection = selection or self.config.training_selection
        if valid_BS is None or is_right_padded:
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).unsqueeze(0)
        else:
            positions_BS = (valid_BS.long().cumsum(dim=1) - 1).clamp(min=0)
        context = self._context(positions_BS, selection, documents_BS, valid_BS, budget)
        seen = context._replace(valid_BS=None) if is_right_padded else context
        context = context._replace(attention_mask_BSS=self._attention_mask(seen), swap=swap)
        x_BSD, routing, experts = self._run_layers(tokens_BS, context, capacities)
        x_BSD = self.norm(x_BSD)
        if targets_BS is None:
            return ModelOutput(self.head(x_BSD), None, {}, routing, experts)
        loss = self.token_loss(x_BSD, self.head.weight, targets_BS)
        # A causal decision would be its own target: there is no auxiliary loss.
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
        budget: ComputeBudget | None = None,
        capacities: Sequence[float | None] | None = None,
        documents_NS: Tensor | None = None,
        valid_NS: Tensor | None = None,
        last_only: bool = False,
    ) -> ModelOutput:
        """Run the next tokens of sequences whose earlier tokens are in ``cache``, and store them.

        The logits equal those of running all tokens at once. A routed part is computed only for
        the sequences with tokens that enter it, and skipped if there are none.

        tokens_NS: the next tokens of the cache's sequences ``rows``, without duplicates; None: all.
        selection: a causal decision; None: the model's first one. capacities: see `forward`.
        documents_NS: document numbers, which keep rising from call to call. valid_NS: False for
        padding, on either side. last_only: return logits (N, 1, V) of each sequence's last token
        only.

        Returns logits and routing records, without those of experts.

        Raises:
            ValueError: the model has no such decision, or ``rows`` does not fit.
        """
        rows = list(range(cache.batch)) if rows is None else rows
        exist = len(rows) > 0 and all(0 <= row < cache.batch for row in rows)
        if not exist or len(rows) != len(tokens_NS) or len(set(rows)) != len(rows):
            raise ValueError(
                f"{len(tokens_NS)} sequences of tokens for the rows {rows} of {cache.batch}"
            )
        tracks_routed = len(cache.routed) == len(self.config.routed_parts)
        if budget is not None and budget.layer_cap is not None and not tracks_routed:
            raise ValueError("layer_cap needs a cache made with tracks_routed=True")
        tokens = pack(tokens_NS, valid_NS, documents_NS)
        start_N1 = torch.tensor([cache.seen[row] for row in rows], device=tokens_NS.device)[:, None]
        context = self._context(
            start_N1 + torch.arange(tokens_NS.shape[1], device=tokens_NS.device),
            self._causal(selection),
            tokens.documents_NS,
            tokens.valid_NS,
            budget,
        )
        routed = tuple(CacheView(store, rows, tokens.counts) for store in cache.routed)
        context = context._replace(routed=routed)
        views = [CacheView(store, rows, tokens.counts) for store in cache.layers]
        x_NSD, routing, _ = self._run_layers(tokens.tokens_NS, context, capacities, views)
        cache.advance(rows, tokens.counts)
        x_NSD = tokens.last(x_NSD) if last_only else tokens.unpack(x_NSD)
        routing = tuple(tokens.unpack_record(record, valid_NS) for record in routing)
        return ModelOutput(self.head(self.norm(x_NSD)), None, {}, routing, ())

    def token_loss(self, x_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor) -> Tensor:
        """Return the mean cross-entropy, in nats per token; parallelism overrides it."""
        return next_token_loss(x_BSD, weight_VD, targets_BS, self.config.loss_chunk)

    def batch_stats(self, output: ModelOutput) -> list[Tensor]:
        """Return a batch's statistics for the running states of routers and experts."""
        modules: list[Any] = [*self.routers, *self.mixtures]
        records = (*output.routing, *output.experts)
        stats = [m.batch_stats(record) for m, record in zip(modules, records, strict=True)]
        return [value for value in stats if value is not None]

    def update_running_stats(self, stats: Sequence[Tensor]) -> None:
        """Update thresholds and biases by a step's `batch_stats`, a mean over batches and ranks."""
        modules: list[MixtureOfDepths | Experts] = [*self.routers, *self.mixtures]
        stateful = [module for module in modules if module.has_running_stats]
        for module, value in zip(stateful, stats, strict=True):
            module.update_running_stats(value)

    def _run_layers(
        self,
        tokens_BS: Tensor,
        context: SequenceContext,
        capacities: Sequence[float | None] | None,
        caches: Sequence[CacheView] | None = None,
    ) -> tuple[Tensor, tuple[RoutingRecord, ...], tuple[ExpertRecord, ...]]:
        """Return the residual stream (B, S, D) after the last layer, and all records."""
        none = [None] * len(self.layers)
        x_BSD = self.embedding(tokens_BS)
        routing: tuple[RoutingRecord, ...] = ()
        experts: tuple[ExpertRecord, ...] = ()
        for layer, cache, capacity in zip(
            self.layers, caches or none, none if capacities is None else capacities, strict=True
        ):
            output = layer(x_BSD, context._replace(cache=cache, capacity=capacity))
            x_BSD = output.value_BSD
            routing, experts = routing + output.routing, experts + output.experts
            context = context.count_entered(output.routing)
            context = context._replace(received_BS=output.received_BS)
        return x_BSD, routing, experts

    def _context(
        self,
        positions_BS: Tensor,
        selection: Selection,
        documents_BS: Tensor | None,
        valid_BS: Tensor | None,
        budget: ComputeBudget | None,
    ) -> SequenceContext:
        """The tokens' context, without an attention mask."""
        config = self.config
        thresholds = None if budget is None else budget.thresholds
        if thresholds is not None and len(thresholds) != (routers := len(config.routed_parts)):
            raise ValueError(f"{len(thresholds)} thresholds for {routers} routers")
        return SequenceContext(
            positions_BS,
            *rotary(positions_BS, config.head_width, config.rope_theta, config.rope_scaling),
            selection,
            config.sliding_window,
            documents_BS,
            valid_BS,
            budget=budget,
        )

    def _attention_mask(self, context: SequenceContext) -> Tensor | None:
        """See `attention_mask`; a method, which context parallelism overrides."""
        return attention_mask(
            context.positions_BS, context.window, context.documents_BS, context.valid_BS
        )

    def _causal(self, selection: Selection | None) -> Selection:
        """Return the causal decision to use. Raises ValueError if there is none."""
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
                "router.score=oracle_norm needs the whole sequence; use a predictor, with"
                " router.gate=none"
            )
        return chosen

    def _auxiliary(
        self, routing: tuple[RoutingRecord, ...], experts: tuple[ExpertRecord, ...]
    ) -> dict[str, Tensor]:
        router, mixture = self.config.router, self.config.experts
        weighted = {"predictor": (1.0, predictor_loss(routing))}
        if "auxiliary" in router.causal_routers:
            weighted["auxiliary"] = (router.auxiliary_weight, auxiliary_loss(routing))
        for name, weight in (
            ("balance_loss", mixture.balance_weight),
            ("z_loss", mixture.z_loss_weight),
        ):
            losses = [getattr(r, name) for r in experts if getattr(r, name) is not None]
            mean = torch.stack(losses).mean() if losses else None
            weighted[name.removesuffix("_loss")] = (weight, mean)
        return {
            name: weight * loss for name, (weight, loss) in weighted.items() if loss is not None
        }


def is_predictor(name: str) -> bool:
    """Whether the parameter of this name belongs to a predictor, which is trained separately."""
    return ".predictor." in name


def router_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of the depth routers and their gates in ``module``."""
    layers = [inner for inner in module.modules() if isinstance(inner, MixtureOfDepths)]
    parts = [part for layer in layers for part in (layer.router, layer.gate) if part is not None]
    return {parameter for part in parts for parameter in part.parameters()}


def deciding_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of the routers, predictors and gates in ``module``."""
    deciding: set[nn.Parameter] = set()
    for inner in module.modules():
        parts: tuple[nn.Module | None, ...] = ()
        if isinstance(inner, MixtureOfDepths):
            parts = (inner.router, inner.predictor, inner.gate)
        elif isinstance(inner, Experts):
            parts = (inner.expert_router,)
        deciding.update(p for part in parts if part is not None for p in part.parameters())
    return deciding


def routing_names(model: nn.Module) -> set[str]:
    """Return the names of what depth routing adds to ``model``, parameters and buffers.

    Of routers, gates, predictors and thresholds, not of what they route.
    """
    return {
        f"{prefix}.{name}"
        for prefix, inner in model.named_modules()
        if isinstance(inner, MixtureOfDepths)
        for name in inner.state_dict()
        if not name.startswith("module.")
    }


@torch.no_grad()
def zero_scores(model: Transformer) -> None:
    """Let every router with learned scores score each token 0, until it is trained."""
    for layer in model.routers:
        router = layer.router
        if isinstance(router, LinearRouter):
            router.weight.zero_()
        elif isinstance(router, MLPRouter):
            router.out.weight.zero_()
            router.out.bias.zero_()


def hidden_matrices(model: Transformer) -> list[nn.Parameter]:
    """Return the matrices that the layers multiply by, each one (out, in), in running order.

    Those of mixers, MLPs and shared experts. Not the embedding and the head, nor what decides, nor
    routed experts, whose matrices lie in one tensor (E, in, out), nor a convolution's taps.
    `modtrain.models.flops.hidden_matrix_shapes` has their shapes.
    """
    deciding = deciding_parameters(model)
    linears = [m for layer in model.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    weights = [linear.get_parameter("weight") for linear in linears]
    return [weight for weight in weights if weight not in deciding]


def _layer(config: ModelConfig, index: int) -> nn.Module:
    capacity = config.capacities[index]
    attention: nn.Module
    if config.mixers[index] == "convolution":
        attention = Convolution(config)
    else:
        next_is_routed = index + 1 < config.num_layers and config.capacities[index + 1] is not None
        attention = Attention(config, next_is_routed and config.router.score == "attention")
    mlp = Experts(config) if config.has_experts(index) else FeedForward(config)
    if capacity is None:
        return Residual(Block(attention, mlp))

    def routed(module: nn.Module, part: str) -> MixtureOfDepths:
        number = config.routed_parts.index((index, part))
        router = config.router
        if part == "mlp" and router.keep_kv:
            # It has no keys and values.
            router = replace(router, keep_kv=False)
        return MixtureOfDepths(
            module, config.d_model, capacity, router, eps=config.norm_eps, number=number
        )

    target = config.router.target
    if target == "block":
        return routed(Block(attention, mlp), "block")
    return SplitLayer(
        Residual(attention) if target == "mlp" else routed(attention, "attention"),
        Residual(mlp) if target == "attention" else routed(mlp, "mlp"),
    )
