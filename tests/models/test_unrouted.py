"""The model of the unrouted layers alone, the fair control of a routed one."""

from itertools import compress

import pytest
import torch

from modtrain.models.config import ModelConfig, unrouted_layers
from modtrain.models.depth.config import RouterConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.transformer import Transformer

SMALL = {"d_model": 16, "num_heads": 2, "vocab_size": 11, "num_layers": 4}


@pytest.mark.parametrize(
    ("changes", "num_layers"),
    [
        ({}, 2),
        ({"pattern": [0.25, 1, 1, 1]}, 3),
        ({"pattern": "all_but_ends", "mixer": ["attention"] * 3 + ["convolution"]}, 2),
        ({"experts": ExpertsConfig(count=4)}, 2),
        # Experts in the routed layers 1 and 3 only, then in one unrouted layer of three.
        ({"experts": ExpertsConfig(count=4, every=2)}, 2),
        ({"experts": ExpertsConfig(count=4, every=2), "pattern": [1, 0.5, 1, 1]}, 3),
    ],
)
def test_it_computes_what_is_left_where_routed_layers_do_nothing(changes, num_layers):
    config = ModelConfig(**SMALL | changes)
    control = unrouted_layers(config)
    assert control is not None
    assert control.num_layers == num_layers
    assert not control.is_routed
    assert control.problems() == []
    routed, dense = Transformer(config), Transformer(control)
    is_kept = [capacity is None for capacity in config.capacities]
    kept = [*compress(routed.layers, is_kept)]
    for own, layer in zip(dense.layers, kept, strict=True):
        own.load_state_dict(layer.state_dict())
    for name in ("embedding", "norm", "head"):
        getattr(dense, name).load_state_dict(getattr(routed, name).state_dict())
    for router in routed.routers:
        torch.nn.init.zeros_(router.router.weight)
    tokens_BS = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(0))
    logits = [model(tokens_BS).require_logits() for model in (routed, dense)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": "dense"},
        {"pattern": "every"},
        {"router": RouterConfig(target="mlp")},
        # Experts in the first, third and last of four remaining layers: no period has these.
        {"num_layers": 5, "pattern": [1, 1, 1, 0.5, 1], "experts": ExpertsConfig(count=4, every=2)},
    ],
)
def test_there_is_none_without_whole_unrouted_layers(changes):
    assert unrouted_layers(ModelConfig(**SMALL | changes)) is None
