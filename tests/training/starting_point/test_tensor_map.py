"""Which tensors of another run a model takes, by name."""

from dataclasses import replace

import pytest
import torch

from modtrain.checkpoint.state import MODEL, OPTIMIZER, model_tensors, named_state, take
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import RouterConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.init import canonical_name
from modtrain.models.transformer import Transformer
from modtrain.optimizers.config import OptimizerConfig
from modtrain.optimizers.registry import build_optimizer
from modtrain.training.starting_point.config import InitConfig
from modtrain.training.starting_point.tensor_map import map_tensors
from tests.helpers.saved import save_whole

DENSE = ModelConfig(
    d_model=16, num_layers=4, num_heads=2, d_ff=16, vocab_size=24, pattern="dense", capacity=1.0
)
ROUTED = replace(DENSE, pattern="every_other", capacity=0.5)
WITH_EXPERTS = replace(DENSE, num_layers=2, experts=ExpertsConfig(count=2, top_k=1))
BY_PATTERN = InitConfig(run="other", map="pattern")
ALL_DECISIONS = ["predictor", "threshold"]


def with_router(model=ROUTED, **router):
    return replace(model, router=RouterConfig(**router))


@pytest.mark.parametrize("target", ["block", "attention", "mlp", "both"])
@pytest.mark.parametrize("base", [DENSE, WITH_EXPERTS], ids=["mlp", "experts"])
def test_another_pattern_takes_all_but_the_routers(base, target):
    routed = with_router(
        replace(base, pattern="every_other", capacity=0.5),
        **{"target": target, "causal": ALL_DECISIONS, "gate_scale": True, "score": "mlp"},
    )
    there = map_tensors(routed, base, BY_PATTERN, "other")
    back = map_tensors(base, routed, BY_PATTERN, "other")
    names = {key.removeprefix(MODEL) for key in model_tensors(Transformer(base))}
    assert set(there.taken.values()) == set(back.taken) == names
    assert {here: source for source, here in back.taken.items()} == there.taken
    assert there.new == back.left
    assert not (there.mismatches or there.left or back.mismatches or back.new)
    own = [canonical_name(key) for key in model_tensors(Transformer(routed))]
    assert len(set(own)) == len(own)


def test_a_router_of_another_kind_starts_anew():
    mlp = with_router(score="mlp", predictor_dim=8)
    tensors = map_tensors(mlp, with_router(), BY_PATTERN, "other")
    assert not tensors.mismatches
    assert "layers.1.router.weight" in tensors.left
    assert "layers.1.router.out.weight" in tensors.new
    assert "layers.3.predictor.hidden.weight" in tensors.new


def test_all_that_does_not_match_is_listed_by_tensor():
    wider = replace(ROUTED, d_ff=32, vocab_size=25)
    assert map_tensors(wider, DENSE, InitConfig(run="other"), "other").mismatches == (
        "embedding.weight: (24, 16) in other, (25, 16) now",
        "layers.0-3.mlp.up.weight: (16, 16) in other, (32, 16) now",
        "layers.0-3.mlp.gate.weight: (16, 16) in other, (32, 16) now",
        "layers.0-3.mlp.down.weight: (16, 16) in other, (16, 32) now",
        "layers.1,3.router.weight: (16,), and other has none",
        "layers.1,3.predictor.hidden.weight: (64, 16), and other has none",
        "layers.1,3.predictor.hidden.bias: (64,), and other has none",
        "layers.1,3.predictor.out.weight: (1, 64), and other has none",
        "layers.1,3.predictor.out.bias: (1,), and other has none",
        "head.weight: (24, 16) in other, (25, 16) now",
    )
    untied = map_tensors(replace(DENSE, tie_embeddings=True), DENSE, InitConfig(run="o"), "o")
    assert untied.mismatches == ("head.weight: (24, 16) in o, and none now",)


def test_layers_take_the_layers_that_they_name(tmp_path):
    """Some twice, one none, and the optimizer's state with them."""
    parent, model = Transformer(DENSE, seed=1), Transformer(replace(DENSE, num_layers=5), seed=2)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = build_optimizer(parent, OptimizerConfig())
    parent(torch.arange(8)[None], torch.arange(8)[None]).loss.backward()
    optimizer.step()
    saved, groups = named_state(parent, optimizer)
    save_whole(tmp_path / "step-000000001", saved, 1, groups)
    init = InitConfig(run="other", layers=[0, 1, 1, None, 3])
    tensors = map_tensors(model.config, DENSE, init, "other")
    assert not tensors.mismatches
    assert all(name.startswith("layers.3.") for name in tensors.new)
    assert all(name.startswith("layers.2.") for name in tensors.left)
    own = build_optimizer(model, OptimizerConfig())
    take(tmp_path / "step-000000001", model, tensors.taken, own)
    for name, parameter in model.named_parameters():
        if name in tensors.new:
            assert torch.equal(parameter, before[name])
            assert not own.state.get(parameter)
            continue
        source = tensors.taken[name]
        assert torch.equal(parameter, saved[MODEL + source])
        moment = own.state[parameter]["exp_avg"]
        assert torch.equal(moment, saved[f"{OPTIMIZER}{source}.exp_avg"])
        assert own.state[parameter]["step"] == 1
    assert tensors.taken["layers.2.module.mlp.inner.up.weight"].startswith("layers.1.")


def test_tensors_that_are_not_named_stay_as_they_are(tmp_path):
    parent, model = Transformer(DENSE, seed=1), Transformer(ROUTED, seed=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_whole(tmp_path / "step-000000001", named_state(parent)[0], 1)
    tensors = map_tensors(ROUTED, DENSE, BY_PATTERN, "other")
    take(tmp_path / "step-000000001", model, tensors.taken)
    for name, value in model.state_dict().items():
        expected = parent.state_dict()[name] if name in tensors.taken else before[name]
        assert torch.equal(value, expected), name
