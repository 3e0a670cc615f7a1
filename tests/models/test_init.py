"""Initial weights by class and name, and models that come back from disk bit for bit."""

import math

import pytest
import torch

from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import RouterConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.transformer import Transformer
from tests.helpers.model_cases import small

CLASSES = {
    "embedding.weight": 0.02,
    "head.weight": 0.02,
    "q.weight": 0.02,
    "k.weight": 0.02,
    "v.weight": 0.02,
    "up.weight": 0.02,
    "gate.weight": 0.02,
    "hidden.weight": 0.02,
    "predictor.out.weight": 0.02,
    "router.weight": 1 / math.sqrt(128),
}


def expected_std(name: str, num_layers: int) -> float:
    if name.endswith(("attention.out.weight", "mlp.down.weight")):
        return 0.02 / math.sqrt(2 * num_layers)
    return next(std for suffix, std in CLASSES.items() if name.endswith(suffix))


def named(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        name.replace(".module.", ".").replace(".inner.", "."): parameter.detach()
        for name, parameter in Transformer(config, seed).named_parameters()
    }


def test_the_default_spread_falls_with_the_width():
    stds = {d: ModelConfig(d_model=d, num_heads=2).weight_std for d in (64, 128, 1024)}
    assert stds == {d: pytest.approx(math.sqrt(0.4 / d)) for d in stds}
    weight = named(ModelConfig(d_model=128, num_heads=4, vocab_size=512))["head.weight"]
    assert float(weight.std()) == pytest.approx(stds[128], rel=0.02)


@pytest.mark.parametrize("num_layers", [2, 8])
def test_each_class_of_weights_has_its_spread_and_depth_scales_the_writers(num_layers):
    config = ModelConfig(
        d_model=128, num_layers=num_layers, num_heads=4, vocab_size=512, init_std=0.02
    )
    for name, parameter in named(config, seed=1).items():
        if name.endswith("gain"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            # Five standard errors of an estimated deviation, and of an estimated mean.
            std, count = expected_std(name, num_layers), parameter.numel()
            assert float(parameter.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * count)), name
            assert abs(float(parameter.mean())) < 5 * std / math.sqrt(count), name


FAMILY = {
    # Names as they stand in the model, and the spread of each where init_std is 0.02.
    ".router.hidden.weight": 1 / math.sqrt(128),
    ".router.out.weight": 1 / math.sqrt(64),
    ".taps": 1 / math.sqrt(4),
    ".expert_router.weight": 0.02,
    ".mlp.up": 0.02,
    ".mlp.gate": 0.02,
    ".mlp.down": 0.02 / math.sqrt(2 * 2),
    ".shared.down.weight": 0.02 / math.sqrt(2 * 2),
}


@pytest.mark.parametrize("target", ["block", "both"])
def test_experts_convolutions_and_routers_of_two_layers_have_theirs(target):
    config = ModelConfig(
        d_model=128,
        num_layers=2,
        num_heads=4,
        vocab_size=64,
        init_std=0.02,
        mixer="convolution",
        pattern="every",
        router=RouterConfig(score="mlp", target=target, gate_scale=True),
        experts=ExpertsConfig(count=4, top_k=1, shared=1, noop=4, dim=64),
    )
    parameters = named(config)
    for suffix, std in FAMILY.items():
        weights = [p for name, p in parameters.items() if name.endswith(suffix)]
        assert len(weights) == (4 if target == "both" and ".router." in suffix else 2), suffix
        for parameter in weights:
            tolerance = 5 / math.sqrt(2 * parameter.numel())
            assert float(parameter.std()) == pytest.approx(std, rel=tolerance), suffix
    scales = [p for name, p in parameters.items() if name.endswith("gate.scale")]
    assert scales
    assert all(float(scale) == 1 for scale in scales)


def test_a_routed_mlps_router_and_its_experts_router_start_differently():
    """Both are called router in an MLP; their names must not come to one seed or one spread."""
    experts = ExpertsConfig(count=2, top_k=1)
    router = RouterConfig(target="mlp")
    parameters = named(small(pattern="every", router=router, experts=experts))
    depth, expert = (
        parameters[f"layers.0.mlp.{name}.weight"].flatten() for name in ("router", "expert_router")
    )
    assert depth[0] / depth[1] != expert[0] / expert[1]


@pytest.mark.parametrize("pattern", ["every", "every_other", [0.5, 1, 1, 0.125]])
@pytest.mark.parametrize("causal", [[], ["predictor"]])
def test_routers_and_predictors_leave_the_trunk_bitwise_as_it_was(pattern, causal):
    dense = named(small(pattern="dense"))
    routed = named(small(pattern=pattern, router=RouterConfig(causal=causal, predictor_dim=8)))
    assert dense.keys() < routed.keys()
    for name, parameter in dense.items():
        assert torch.equal(parameter, routed[name]), name
    extra = routed.keys() - dense.keys()
    assert all(".router." in name or ".predictor." in name for name in extra)


def test_no_two_parameters_and_no_two_seeds_share_their_draws():
    first, again, other = named(small()), named(small()), named(small(), seed=1)
    heads = []
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), name
        if not name.endswith(("gain", "bias")):
            assert not torch.equal(parameter, other[name]), name
            heads.append(float(parameter.flatten()[0] / parameter.flatten()[1]))
    assert len(set(heads)) == len(heads)


def test_the_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = named(small(), seed=7)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = named(small(), seed=7)
    assert all(torch.equal(first[name], second[name]) for name in first)
