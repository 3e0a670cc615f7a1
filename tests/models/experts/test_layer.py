"""Mixtures of experts against loops over tokens, and what has to hold of them.

Shapes: B batch, S sequence, D model, E experts, N rows, F features out.
"""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modtrain.models.config import ModelConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.experts.layer import Experts
from tests.helpers.model_cases import quick
from tests.models.experts.experts_reference import (
    DIM,
    assert_close,
    config_of,
    configs,
    context_of,
    lively,
    mixture,
    normal,
)

CAUSAL = ("auxiliary", "predictor", "threshold", "causal")
VARIANTS = {
    "dropless": {},
    "no-ops": {"noop": 2, "shared": 1},
    "bias": {"balance": "bias", "top_k": 1, "noop": 1},
    "limited": {"capacity_factor": 0.6, "noop": 1},
    "expert choice": {"choice": "expert", "noop": 1},
}


def mask_of(kind: str, batch: int, length: int, seed: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "nobody":
        return torch.zeros(batch, length, dtype=torch.bool)
    return normal(batch, length, seed=seed + 50) > (1 if kind == "few" else -0.5)


def losses(value_BSD: Tensor, record: dict, valid_BS: Tensor | None) -> Tensor:
    """One number that everything with a gradient is part of; padding's update is not."""
    if valid_BS is not None:
        value_BSD = value_BSD[valid_BS]
    total = (value_BSD * normal(*value_BSD.shape, seed=7)).sum()
    for name in ("balance_loss", "z_loss"):
        if record[name] is not None:
            total = total + record[name]
    return total


@quick(120)
@given(
    configs(),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from(["top_k", "token", *CAUSAL]),
    st.sampled_from(["none", "some", "few", "nobody"]),
    st.integers(0, 9),
)
@example(config_of(noop=2, capacity_factor=0.4), 9, 2, "top_k", "some", 0)
@example(config_of(noop=1, balance="bias", top_k=1), 9, 2, "causal", "some", 1)
@example(config_of(choice="expert", noop=1), 9, 3, "top_k", "some", 2)
@example(config_of(choice="expert", top_k=4, shared=1), 9, 2, "token", "none", 3)
@example(config_of(choice="expert", noop=1), 9, 2, "threshold", "some", 4)
@example(config_of(choice="expert", top_k=1, capacity_factor=0.4), 9, 3, "top_k", "few", 5)
def test_a_layer_equals_the_reference(config, length, batch, selection, mask, seed):
    """Update, record and every gradient, for any tokens, choice and padding."""
    layer = lively(config, seed)
    valid_BS = mask_of(mask, batch, length, seed)
    context = context_of(length, selection, valid_BS)
    x_BSD = normal(batch, length, DIM, seed=seed).requires_grad_()
    output = layer(x_BSD, context)
    expected_BSD, expected = mixture(layer, config, x_BSD, context)
    (own,) = output.experts
    record = own._asdict() | {"load": own.load, "dropped": own.dropped}
    actual_BSD = output.value_BSD
    if valid_BS is not None:
        assert config.experts.shared or not actual_BSD[~valid_BS].any()
        actual_BSD = torch.where(valid_BS.unsqueeze(-1), actual_BSD, 0)
    assert_close(actual_BSD, expected_BSD, "update")
    for name, value in expected.items():
        if value is None:
            assert record[name] is None, name
        else:
            assert_close(torch.as_tensor(record[name]), torch.as_tensor(value), name)
    for name in ("choices_R", "executed_E"):
        assert not record[name].requires_grad

    leaves = {"input": x_BSD} | dict(layer.named_parameters())
    pairs = [losses(actual_BSD, record, valid_BS), losses(expected_BSD, expected, valid_BS)]
    if not pairs[1].requires_grad:
        return
    ours, theirs = (
        torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=True)
        for total in pairs
    )
    for name, one, two in zip(leaves, ours, theirs, strict=True):
        zero = torch.zeros_like(leaves[name])
        assert_close(zero if one is None else one, zero if two is None else two, f"d {name}")


def steered(number: int, **experts) -> Experts:
    """A layer in which every token's first choice is expert ``number``, by far."""
    layer = lively(config_of(balance="bias", **experts))
    with torch.no_grad():
        layer.bias.zero_()
        layer.bias[number] = 1e6
    return layer


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_no_ops_alone_are_the_identity(capacity_factor):
    layer = steered(4, noop=1, top_k=1, capacity_factor=capacity_factor)
    x_BSD = normal(2, 9, DIM).requires_grad_()
    output = layer(x_BSD, context_of(9))
    assert torch.equal(output.value_BSD, torch.zeros(2, 9, DIM, dtype=torch.float64))
    record = output.experts[0]
    assert not record.executed_E.any()
    assert not record.dropped
    assert record.load.tolist() == [0, 0, 0, 0, 1]
    output.value_BSD.sum().backward()
    assert all(not p.grad.any() for p in layer.parameters() if p.grad is not None)
    if capacity_factor is None:
        with FlopCounterMode(display=False) as counter:
            layer(x_BSD, context_of(9))
        assert counter.get_flop_counts()["Global"][torch.ops.modtrain.grouped_rows] == 0


@pytest.mark.parametrize("noop", [0, 2])
def test_the_bias_evens_the_load(noop):
    config = config_of(noop=noop, balance="bias", bias_rate=0.02)
    layer = lively(config)
    with torch.no_grad():
        layer.bias.zero_()
        layer.expert_router.weight.mul_(0.3)
    x_BSD = normal(4, 64, DIM) + 1
    before = layer(x_BSD, context_of(64)).experts[0].load
    even = 1 / (4 + noop)
    assert before.max() > 1.5 * even
    for _ in range(150):
        layer.update_running_stats(layer.batch_stats(layer(x_BSD, context_of(64)).experts[0]))
    after = layer(x_BSD, context_of(64)).experts[0].load
    assert (after - even).abs().max() < 0.1 * even


def test_expert_choice_learns_the_quantile_of_what_it_takes():
    """Trained on one batch, the causal choice takes as many tokens as training's, batch wide."""
    layer = Experts(config_of(choice="expert", noop=1, threshold_decay=0.9)).double()
    torch.nn.init.normal_(layer.expert_router.weight, generator=torch.Generator().manual_seed(0))
    x_BSD = normal(3, 20, DIM)
    for _ in range(3):
        trained = layer(x_BSD, context_of(20)).experts[0]
        layer.update_running_stats(layer.batch_stats(trained))
    assert_close(layer.quantile_sum / layer.quantile_weight, trained.quantile_E, "quantile")
    assert layer.quantile_weight.item() == pytest.approx(1 - 0.9**3)
    causal = layer(x_BSD, context_of(20, "threshold")).experts[0]
    assert torch.equal(causal.executed_E, trained.executed_E)
    assert trained.executed_E.tolist() == [24.0] * 4


def test_an_untrained_quantile_is_the_even_share():
    layer = Experts(config_of(choice="expert")).double()
    with torch.no_grad():
        layer.expert_router.weight[0] = 1
    x_BSD = torch.stack([torch.ones(1, DIM), -torch.ones(1, DIM)], 1).double()
    record = layer(x_BSD, context_of(2, "causal")).experts[0]
    assert record.executed_E.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_leaves_the_buffers_alone(variant):
    layer = lively(config_of(**VARIANTS[variant]))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    record = layer(normal(1, 9, DIM), context_of(9)).experts[0]
    assert all(torch.equal(before[name], buffer) for name, buffer in layer.named_buffers())
    assert (layer.batch_stats(record) is None) == (not before)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("selection", ["top_k", "causal"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_in_padding_and_in_unwritten_memory_goes_nowhere(variant, selection):
    layer = lively(config_of(**VARIANTS[variant]))
    valid_BS = torch.arange(9) < torch.tensor([[5], [9], [0]])
    results = []
    for filling in (0.0, math.nan):
        x_BSD = torch.where(valid_BS.unsqueeze(-1), normal(3, 9, DIM), filling).requires_grad_()
        output = layer(x_BSD, context_of(9, selection, valid_BS))
        record = output.experts[0]
        assert not output.value_BSD[~valid_BS].any()
        total = losses(output.value_BSD, record._asdict(), valid_BS)
        gradients = torch.autograd.grad(total, [x_BSD, *layer.parameters()])
        assert all(gradient.isfinite().all() for gradient in gradients)
        results.append([output.value_BSD, record.load, record.executed_E, *gradients])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def multiplied(layer: Experts, x_BSD: Tensor) -> float:
    """Pairs of an expert and a token, from the FLOPs of three matrices in one forward pass."""
    with FlopCounterMode(display=False) as counter:
        layer(x_BSD, context_of(x_BSD.shape[1]))
    counts = counter.get_flop_counts()["Global"]
    flops = counts.get(torch.ops.aten.bmm, 0) + counts.get(torch.ops.modtrain.grouped_rows, 0)
    return flops / (3 * 2 * DIM * 5)


@quick(40)
@given(configs(dim=5, shared=0), st.integers(1, 9))
def test_computed_slots_are_those_of_a_run(config, length):
    config.activation = "swiglu"
    layer = lively(config)
    x_BSD = normal(1, length, DIM)
    slots = multiplied(layer, x_BSD)
    if config.experts.slots(length) is not None or config.experts.noop == 0:
        assert config.experts.computed_slots(length) == pytest.approx(slots)
    executed = layer(x_BSD, context_of(length)).experts[0].executed_E.sum()
    if config.experts.slots(length) is None:
        assert executed == pytest.approx(slots)
    else:
        assert executed <= slots + 1e-6


def test_computed_slots_of_an_even_load_with_no_ops():
    config = config_of(count=4, noop=2, top_k=1)
    layer = lively(config)
    with torch.no_grad():
        layer.norm.gain.fill_(1)
        layer.expert_router.weight.copy_(torch.eye(6))
    assert multiplied(layer, torch.eye(6, dtype=torch.float64)[None]) == pytest.approx(4)
    assert config.experts.computed_slots(6) == pytest.approx(4)


def test_without_experts_there_is_nothing_to_build_or_count():
    with pytest.raises(ValueError, match="there are no experts"):
        Experts(ModelConfig())
    with pytest.raises(ValueError, match="there are no experts"):
        ExpertsConfig().computed_slots(8)


def run(layer: Experts, call, x_BSD: Tensor, context, autocast: bool) -> list[Tensor]:
    layer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = call(x_BSD, context)
    record = output.experts[0]
    losses(output.value_BSD.float(), record._asdict(), None).backward()
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    return [output.value_BSD.detach(), record.load, record.executed_E, *gradients]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("selection", ["top_k", "causal"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_is_one_graph_equal_to_eager(variant, selection, autocast):
    layer = lively(config_of(**VARIANTS[variant])).float()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    x_BSD, context = normal(2, 16, DIM).float(), context_of(16, selection)
    eager = run(layer, layer, x_BSD, context, autocast)
    rtol = 0.05 if autocast else 1e-4
    for one, two in zip(eager, run(layer, compiled, x_BSD, context, autocast), strict=True):
        assert one.dtype == two.dtype == torch.float32
        assert (one - two).abs().max() <= rtol * one.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_and_autocast_are_near_float64(variant):
    # The choices may differ where two scores are near; a wide router keeps them distinct.
    layer = lively(config_of(**VARIANTS[variant]))
    x_BSD, context = normal(2, 16, DIM), context_of(16)
    exact = layer(x_BSD, context).value_BSD
    layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = layer(x_BSD.float(), context).value_BSD
    assert cast.dtype == torch.float32
    assert ((cast - exact).norm() / exact.norm()) < 0.03
    assert not torch.equal(cast, layer(x_BSD.float(), context).value_BSD)
    layer.bfloat16()
    narrow = layer(x_BSD.bfloat16(), context)
    assert narrow.value_BSD.dtype == torch.bfloat16
    assert narrow.experts[0].load.dtype == torch.float32
    narrow.value_BSD.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
