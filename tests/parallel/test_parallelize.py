"""Models sharded over ranks compute, learn and decide as one process does on the whole batch."""

import functools

import pytest
import torch
from torch.distributed.tensor import DTensor

from modtrain.common.ignored_target import IGNORED
from modtrain.models.depth.config import RouterConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.transformer import Transformer
from modtrain.parallel.config import LayerOptions
from modtrain.parallel.dims import ParallelDims
from modtrain.parallel.meshes import make_meshes
from modtrain.parallel.parallelize import parallelize, prepare_layers
from modtrain.parallel.tensor import TPLinear
from modtrain.parallel.validation import tensor_problems
from tests.helpers.model_cases import MODELS, distinct_tokens, small
from tests.helpers.near import assert_near
from tests.helpers.ranks import on_ranks

# Five experts, which four ranks do not share evenly.
_STAGED = small(
    num_layers=2,
    router=RouterConfig(choice="token"),
    experts=ExpertsConfig(count=5, top_k=1, dim=12, shared=1, balance="bias"),
)


def _gathers_in(precision):
    model = Transformer(_STAGED)
    parallelize(model, make_meshes(ParallelDims(2, shard=2)), LayerOptions(precision))
    narrow = []

    def look(module, inputs, prefix):
        for name, parameter in module.named_parameters(recurse=False):
            assert not isinstance(parameter, DTensor), "computes with a piece"
            narrow.extend([f"{prefix}.{name}"] * (parameter.dtype == torch.bfloat16))

    for prefix, module in model.named_modules():
        module.register_forward_pre_hook(functools.partial(look, prefix=prefix))
    tokens_BS = distinct_tokens(1, 9)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens_BS, tokens_BS)
    return sorted(narrow)


def test_only_layers_matrices_are_gathered_narrow():
    mixer = [f"attention.{name}.weight" for name in ("k", "out", "q", "v")]
    inner = [f"mlp.inner.{name}" for name in ("down", "gate", "up")]
    shared = [f"mlp.shared.{name}.weight" for name in ("down", "gate", "up")]
    wanted = [f"layers.{i}.module.{n}" for i in (0, 1) for n in (*mixer, *inner, *shared)]
    assert on_ranks(_gathers_in, 2, "bf16") == [wanted] * 2
    assert on_ranks(_gathers_in, 2, "fp32") == [[]] * 2


def test_options_reach_every_layer():
    model = Transformer(MODELS["mod"])
    options = LayerOptions(activation_checkpointing="full", compile=True)
    prepare_layers(model, options)
    for layer in model.layers:
        assert "Checkpoint" in type(layer).__name__
        assert layer._compiled_call_impl is not None


def _of_a_part(tokens_BS, targets_BS, documents_BS):
    model = Transformer(MODELS["separately routed parts"])
    parallelize(model, make_meshes(ParallelDims(2, tensor=2)), LayerOptions())
    return _loss_and_gradients(model, *map(torch.tensor, (tokens_BS, targets_BS, documents_BS)))


def _loss_and_gradients(model, tokens_BS, targets_BS, documents_BS):
    with torch.no_grad():
        logits_BSV = model(tokens_BS).require_logits()
    output = model(tokens_BS, targets_BS, documents_BS=documents_BS)
    output.loss.backward()
    gradients = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return (
        float(output.loss.detach()),
        logits_BSV.numpy(),
        {n: g.numpy() for n, g in gradients.items()},
    )


@pytest.mark.parametrize("length", [1, 9])
def test_shares_of_a_loss_that_leaves_tokens_out(length):
    """One rank's share counts for less than the other's, or for nothing."""
    tokens_BS = distinct_tokens(2, length, 1)
    targets_BS = distinct_tokens(2, length, 2)
    targets_BS[0, length // 2 :] = IGNORED
    documents_BS = torch.arange(length).expand(2, -1) // 4
    whole = Transformer(MODELS["separately routed parts"])
    loss, logits_BSV, gradients = _loss_and_gradients(whole, tokens_BS, targets_BS, documents_BS)
    wanted = {"loss": loss, "logits": logits_BSV, **gradients}
    inputs = [x.tolist() for x in (tokens_BS, targets_BS, documents_BS)]
    for loss, logits_BSV, gradients in on_ranks(_of_a_part, 2, *inputs):
        assert_near({"loss": loss, "logits": logits_BSV, **gradients}, wanted)


def test_what_cannot_be_sliced_is_reported_at_once():
    config = small(
        num_heads=4,
        num_kv_heads=2,
        d_ff=30,
        mixer=["attention", "convolution"] * 2,
        router=RouterConfig(score="attention", target="mlp"),
        experts=ExpertsConfig(count=2, top_k=2, every=4, dim=6),
    )
    problems = tensor_problems(config, 4)
    keys = ["num_kv_heads", "d_ff", "experts.dim", "router.score"]
    assert [problem.key for problem in problems] == [f"model.{key}" for key in keys]
    assert [p.key for p in tensor_problems(config, 3)][:2] == [
        "model.num_heads",
        "model.num_kv_heads",
    ]
    assert "model.d_model" in [p.key for p in tensor_problems(config, 3)]
    assert tensor_problems(config, 1) == []
    assert "is made of all heads" in str(tensor_problems(config, 2)[0])


def _pieces():
    model = Transformer(_STAGED)
    parallelize(model, make_meshes(ParallelDims(4, shard=4)), LayerOptions())
    return {name: tuple(p.to_local().shape) for name, p in model.named_parameters()}


def test_few_experts_are_sharded_by_their_features():
    """Sharded by number, five experts on four ranks would travel as eight."""
    mlp = "layers.1.module.mlp."
    for shapes in on_ranks(_pieces, 4):
        assert shapes[f"{mlp}inner.up"] == (5, 4, 12)
        assert shapes[f"{mlp}inner.down"] == (5, 3, 16)
        assert shapes[f"{mlp}shared.up.weight"] == (3, 16)


def test_a_weight_that_is_not_sliced_is_refused():
    """Whole, it would be counted once by each rank."""
    linear = torch.nn.Linear(2, 2)
    linear.__class__ = TPLinear
    with pytest.raises(TypeError, match="not sliced"):
        linear(torch.ones(1, 2))
