"""Activation checkpointing changes memory alone: not losses, gradients, draws or names."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from modtrain.models.config import RouterConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.transformer import ModelOutput, Transformer
from modtrain.parallel import activation_checkpointing
from tests.helpers.dispatch import Seen
from tests.helpers.model_cases import random_tokens, small

MODES = ["none", "selective", "full"]
MODELS = {
    "dense": {"pattern": "dense"},
    "drawing": {"router": RouterConfig(score="random")},
    "by attention": {"router": RouterConfig(score="attention")},
    "with state": {"router": RouterConfig(target="both", causal=["threshold", "predictor"])},
    "experts": {"experts": ExpertsConfig(count=4, noop=1, balance="bias")},
}
pytestmark = pytest.mark.usefixtures("fresh_compiler")


def tensors_made(name: str, mode: str, num_layers: int = 4) -> Transformer:
    model = Transformer(small(num_layers=num_layers, init_std=0.2, **MODELS[name]))
    activation_checkpointing.apply(model, mode)
    return model


def forward(call, length: int = 16) -> tuple[ModelOutput, Tensor]:
    """The output, and the sum of its losses."""
    tokens_BS = random_tokens(2, length + 1)
    torch.manual_seed(2)
    output = call(tokens_BS[:, :-1], tokens_BS[:, 1:])
    return output, torch.stack([output.loss, *output.auxiliary.values()]).sum()


def step(
    name: str, mode: str, backend: str | None = None, autocast: bool = False
) -> dict[str, Tensor]:
    """Losses, gradients and running states of one step, by name, and what is drawn next."""
    model = tensors_made(name, mode, 2)
    call = model
    if backend is not None:
        call = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output, total = forward(call)
    total.backward()
    model.update_running_stats(model.batch_stats(output))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    states = {name: buffer + 0 for name, buffer in model.named_buffers()}
    return {"loss": output.loss, **output.auxiliary, **gradients, **states, "next": torch.randn(3)}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_bitwise_the_same_in_every_mode(name, autocast):
    expected = step(name, "none", autocast=autocast)
    for mode in ("selective", "full"):
        actual = step(name, mode, autocast=autocast)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("mode", MODES)
def test_names_and_state_are_those_of_the_bare_model(mode):
    bare, model = tensors_made("with state", "none"), tensors_made("with state", mode)
    for method in ("named_parameters", "named_buffers", "state_dict"):
        expected, actual = dict(getattr(bare, method)()), dict(getattr(model, method)())
        assert list(actual) == list(expected)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())
    # The wrapper has the name of what it wraps.
    names = dict.fromkeys(n for n, _ in model.named_modules())
    assert list(names) == [n for n, _ in bare.named_modules()]
    wrapped = {type(module) for module in model.modules()} - {type(m) for m in bare.modules()}
    assert len(wrapped) == (mode != "none")
    with torch.no_grad():
        for parameter in bare.parameters():
            parameter.add_(1)
    model.load_state_dict(bare.state_dict())
    bare.load_state_dict(model.state_dict())
    for name, parameter in bare.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
    tokens_BS = random_tokens(2, 16)
    with torch.no_grad():
        assert torch.equal(model(tokens_BS).logits_BSV, bare(tokens_BS).logits_BSV)
    assert not any(module.training for module in model.eval().modules())
    assert len(list(copy.deepcopy(model).parameters())) == len(list(bare.parameters()))


def kept_bytes(mode: str) -> int:
    """Bytes that a forward pass leaves behind for its backward pass."""
    model = tensors_made("with state", mode)
    with Seen() as seen:
        _, total = forward(model, 47)
    kept = seen.live_bytes()
    total.backward()
    return kept


def test_each_mode_keeps_less_than_the_one_before():
    none, selective, full = (kept_bytes(mode) for mode in MODES)
    assert selective < 0.8 * none
    assert full < 0.4 * none


def backward_flops(mode: str) -> int:
    _, total = forward(tensors_made("with state", mode))
    with FlopCounterMode(display=False) as counter:
        total.backward()
    return counter.get_total_flops()


def test_selective_repeats_no_product_and_full_repeats_what_it_must():
    none, selective, full = (backward_flops(mode) for mode in MODES)
    assert selective == none
    assert full > 1.2 * none


def test_selective_repeats_norms_but_neither_attention_nor_choices():
    _, total = forward(tensors_made("with state", "selective"))
    with Seen() as seen:
        total.backward()
    repeated = " ".join(seen.names)
    assert "aten::silu " in repeated
    assert "aten::topk" not in repeated
    assert "aten::sort" not in repeated
    assert "flash_attention_for_cpu " not in repeated


def test_selective_keeps_the_results_of_modtrains_own_operations():
    calls = []

    @torch.library.custom_op("modtrain::checkpointing_test", mutates_args=())
    def double(x: Tensor) -> Tensor:
        calls.append(x)
        return 2 * x

    double.register_autograd(lambda _context, gradient: 2 * gradient)

    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return double(x.sin()).square()

    model = nn.Module()
    model.layers = nn.ModuleList([Doubling()])
    activation_checkpointing.apply(model, "selective")
    x = torch.ones(3, requires_grad=True)
    model.layers[0](x).sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(x.grad, 8 * x.detach().sin() * x.detach().cos())


@pytest.mark.on_commit(1)
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "aot_eager") for name in MODELS), ("dense", "inductor")]
)
def test_a_step_compiles_to_one_graph_in_every_mode(name, backend, mode):
    expected, actual = step(name, "none"), step(name, mode, backend)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-5)


def test_an_unknown_mode_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match="none, selective, full, not partial"):
        activation_checkpointing.apply(nn.Module(), "partial")
