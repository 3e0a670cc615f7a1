"""The whole training step compiles without a graph break, and computes what eager computes."""

from __future__ import annotations

import pytest
import torch
from model_cases import lively, random_tokens, small
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from modtrain.models.transformer import Transformer

PATTERNS = ["dense", "every_other", "every"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model: Transformer, call, autocast: bool) -> tuple[Tensor, list[Tensor], dict]:
    """Losses, who was chosen, and every gradient, of one step through ``call``."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = call(random_tokens(2, 32), random_tokens(2, 32, 1))
        losses = torch.stack([output.loss, *output.auxiliary.values()])
    losses.sum().backward()
    chosen = [record.chosen_BS for record in output.routing]
    return losses.detach(), chosen, {name: p.grad for name, p in model.named_parameters()}


def assert_compiled_equals_eager(model: Transformer, backend: str, autocast: bool, rtol: float):
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    eager_losses, eager_chosen, eager_gradients = step(model, model, autocast)
    losses, chosen, gradients = step(model, compiled, autocast)
    assert counter.frame_count == 1
    torch.testing.assert_close(losses, eager_losses, rtol=rtol, atol=rtol)
    for one, two in zip(chosen, eager_chosen, strict=True):
        assert torch.equal(one, two)
    for name, gradient in gradients.items():
        scale = float(eager_gradients[name].abs().max())
        error = float((gradient - eager_gradients[name]).abs().max())
        assert error <= rtol * scale, f"{name}: {error / scale:.1e}"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_step_is_one_graph_equal_to_eager(pattern):
    model = lively(small(pattern=pattern, num_kv_heads=1), dtype=torch.float32)
    assert_compiled_equals_eager(model, "aot_eager", autocast=False, rtol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_step_under_autocast_is_one_graph_equal_to_eager(pattern):
    model = Transformer(small(pattern=pattern, init_std=0.2))
    # bfloat16 keeps eight bits: the same graph, rounded at other places.
    assert_compiled_equals_eager(model, "aot_eager", autocast=True, rtol=0.05)


def test_a_window_and_normed_keys_compile_too():
    model = lively(small(sliding_window=8, qk_norm=True, tie_embeddings=True), dtype=torch.float32)
    assert_compiled_equals_eager(model, "aot_eager", autocast=False, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["dense", "every_other"])
def test_inductors_step_equals_eager(pattern):
    model = Transformer(small(pattern=pattern, init_std=0.2))
    assert_compiled_equals_eager(model, "inductor", autocast=False, rtol=1e-4)


@pytest.mark.slow
def test_inductors_step_under_autocast_is_near_eager():
    """Fused kernels round to bfloat16 less often, so two near scores may change places: the choice
    and with it single gradients differ, the losses hardly do."""
    model = Transformer(small(init_std=0.2))
    eager_losses, eager_chosen, _ = step(model, model, autocast=True)
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    losses, chosen, gradients = step(model, compiled, autocast=True)
    torch.testing.assert_close(losses, eager_losses, rtol=0.02, atol=0)
    for one, two in zip(chosen, eager_chosen, strict=True):
        assert torch.equal(one.sum(dim=1), two.sum(dim=1))
        assert (one == two).double().mean() > 0.9
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("pattern", ["dense", "every_other"])
def test_autocast_keeps_the_residual_stream_and_the_scores_wide(pattern):
    model = Transformer(small(pattern=pattern))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(random_tokens(2, 16), random_tokens(2, 16, 1))
    assert output.loss.dtype == torch.float32
    assert all(record.scores_BS.dtype == torch.float32 for record in output.routing)
    assert all(record.predictor_BS.dtype == torch.float32 for record in output.routing)
