"""The language model: embedding, blocks (dense or routed), head, loss.

Shapes: B batch, S sequence, D model, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modtrain.models.attention import rotary_context
from modtrain.models.block import Block
from modtrain.models.config import ModelConfig
from modtrain.models.depth import MixtureOfDepths, RoutingRecord, Selection, predictor_loss
from modtrain.models.init import initialise
from modtrain.models.norm import RMSNorm
from modtrain.models.router import LinearRouter, Predictor


class ModelOutput(NamedTuple):
    """What a forward pass gives.

    logits_BSV: the next token's logits; None where targets were given.
    loss: mean cross-entropy in nats a token; None without targets.
    auxiliary: further losses to minimise beside it, by name.
    routing: one record a routed layer, in the order of `Transformer.routed_layers`.
    """

    logits_BSV: Tensor | None
    loss: Tensor | None
    auxiliary: dict[str, Tensor]
    routing: tuple[RoutingRecord, ...]


class Transformer(nn.Module):
    """A causal decoder whose blocks are routed as ``config.pattern`` says."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        capacities = config.capacities
        # torch's layers draw weights as they are made, which `initialise` replaces: whoever draws
        # from the global state next is not to notice.
        with torch.random.fork_rng(devices=[]):
            self.embedding = nn.Embedding(config.vocabulary, config.d_model)
            self.layers = nn.ModuleList(_layer(config, capacity) for capacity in capacities)
            self.norm = RMSNorm(config.d_model, config.norm_eps)
            self.head = nn.Linear(config.d_model, config.vocabulary, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.routed_layers = tuple(i for i, c in enumerate(capacities) if c is not None)
        initialise(self, config, seed)

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        selection: Selection = "top_k",
    ) -> ModelOutput:
        """Run the model.

        tokens_BS: token ids. targets_BS: the ids that come next, for the loss.
        selection: who takes part in routed blocks; `Selection` says which choices are causal.
        """
        length = tokens_BS.shape[1]
        positions_BS = torch.arange(length, device=tokens_BS.device).unsqueeze(0)
        context = rotary_context(positions_BS, self.config.head_width, self.config.rope_theta)
        x_BSD = self.embedding(tokens_BS)
        records: list[RoutingRecord] = []
        for layer in self.layers:
            if isinstance(layer, MixtureOfDepths):
                x_BSD, record = layer(x_BSD, context, selection)
                records.append(record)
            else:
                x_BSD = x_BSD + layer(x_BSD, context)
        logits_BSV = self.head(self.norm(x_BSD))
        routing = tuple(records)
        if targets_BS is None:
            return ModelOutput(logits_BSV, None, {}, routing)
        wide = torch.promote_types(logits_BSV.dtype, torch.float32)
        loss = F.cross_entropy(logits_BSV.flatten(0, 1).to(wide), targets_BS.flatten())
        # Under the predictor its own decisions would be the target: no loss to learn from.
        auxiliary = predictor_loss(routing) if selection == "top_k" else None
        return ModelOutput(
            None, loss, {} if auxiliary is None else {"predictor": auxiliary}, routing
        )


def is_predictor(name: str) -> bool:
    """Whether the parameter of this name belongs to a predictor, which trains beside the trunk."""
    return ".predictor." in name


def _layer(config: ModelConfig, capacity: float | None) -> nn.Module:
    block = Block(config)
    if capacity is None:
        return block
    predictor = None
    if "predictor" in config.router.causal:
        predictor = Predictor(config.d_model, config.router.predictor_dim, config.norm_eps)
    router = LinearRouter(config.d_model)
    return MixtureOfDepths(block, router, predictor, capacity, config.router.gate == "raw")
