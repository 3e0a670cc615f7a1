"""Models and contexts that the tests of choice, padding and thresholds share."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import RouterConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.sequence import SequenceContext
from modtrain.models.transformer import Transformer
from tests.helpers.model_cases import (
    balance_predictors,
    context_of,
    lively,
    normal,
    random_tokens,
    settle,
    small,
)

TARGETS = ["block", "attention", "mlp", "both"]


def nearest(x: Fraction) -> int:
    """Halves upwards."""
    return math.floor(x + Fraction(1, 2))


def context(
    length: int, documents_BS: Tensor | None = None, valid_BS: Tensor | None = None
) -> SequenceContext:
    return context_of(
        small(), torch.arange(length)[None], documents_BS=documents_BS, valid_BS=valid_BS
    )


LENGTHS = (16, 12, 8, 4)
EXPERTS = {
    "dropless": {"count": 4},
    "expert choice": {"count": 4, "choice": "expert"},
    "integrated": {"count": 3, "noop": 1, "balance": "bias"},
}


def model_of(experts: str | None = None, **changes) -> ModelConfig:
    mixture = {} if experts is None else {"experts": ExpertsConfig(**EXPERTS[experts])}
    router = {"predictor_dim": 8, "threshold_decay": 0.5} | changes.pop("router", {})
    config = small(num_layers=2, router=RouterConfig(**router), **mixture, **changes)
    assert not config.problems()
    return config


def settled(config: ModelConfig, seed: int = 0) -> Transformer:
    model = settle(lively(config, seed), 16)
    if "predictor" in config.router.causal_routers:
        balance_predictors(model, random_tokens(4, 16))
    return model


def masked(batch: int, length: int, seed: int, side: str) -> Tensor:
    """Valid tokens in front, at the back, or anywhere."""
    if side == "any":
        return normal(batch, length, seed=seed) > -0.5
    generator = torch.Generator().manual_seed(seed)
    count_B1 = torch.randint(0, length + 1, (batch, 1), generator=generator)
    valid_BS = torch.arange(length) < count_B1
    return valid_BS if side == "right" else valid_BS.flip(1)


def two_documents(length: int = 24) -> Tensor:
    return (torch.arange(length) >= length // 2).long()[None]
