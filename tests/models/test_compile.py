"""The whole training step compiles without a graph break, and computes what eager computes."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import RouterConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.transformer import Transformer
from modtrain.optimizers.config import OptimizerConfig
from modtrain.optimizers.registry import build_optimizer
from modtrain.parallel.parallelize import compile_model
from tests.helpers.marks import slow_but
from tests.helpers.model_cases import lively, random_tokens, small

pytestmark = pytest.mark.usefixtures("fresh_compiler")
PATTERNS = ["dense", "every_other", "every"]
BATCH, LENGTH = 2, 32


def routed(**router) -> ModelConfig:
    """Two layers, the second routed at a quarter."""
    return small(num_layers=2, router=RouterConfig(predictor_dim=8, **router))


def mixed(pattern="dense", **experts) -> ModelConfig:
    """Two layers whose MLPs are three experts."""
    values = {"count": 3, "top_k": 2, "dim": 8} | experts
    return small(num_layers=2, pattern=pattern, experts=ExpertsConfig(**values))


def documents() -> dict[str, Tensor]:
    """Three documents in the first sequence, one in the second."""
    ends_BS = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    ends_BS[0, [5, 20]] = 1
    return {"documents_BS": ends_BS.cumsum(dim=1)}


def padding() -> dict[str, Tensor]:
    """Nothing in the first third of the second sequence."""
    valid_BS = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    valid_BS[1, : LENGTH // 3] = False
    return {"valid_BS": valid_BS}


def padding_at_the_end() -> dict[str, Tensor | bool]:
    """Nothing in the last third of the second sequence, for which no mask is made."""
    valid_BS = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    valid_BS[1, -(LENGTH // 3) :] = False
    return {"valid_BS": valid_BS, "is_right_padded": True}


VARIANTS = {
    **{pattern: (small(num_layers=2, pattern=pattern, num_kv_heads=1), {}) for pattern in PATTERNS},
    "both parts": (routed(target="both", causal=["auxiliary", "predictor", "threshold"]), {}),
    "token choice": (routed(choice="token"), {}),
    "documents": (routed(), documents()),
    "experts": (mixed(shared=1, noop=1), {}),
    "staged MoDE, expert choice": (mixed("every_other", choice="expert", noop=1), {}),
    "attention's router": (routed(target="attention"), {}),
    "MLP's router": (routed(target="mlp"), {}),
    "MLP score": (routed(score="mlp", hidden_dim=6), {}),
    "attention score": (routed(score="attention"), {}),
    "attention score, window": (replace(routed(score="attention"), sliding_window=5), {}),
    "attention score, MLPs": (
        replace(routed(score="attention", target="mlp"), num_layers=3, pattern=[1, 0.25, 0.5]),
        {},
    ),
    "kept keys": (routed(keep_kv=True), {}),
    "kept keys, both parts, documents, padding": (
        routed(keep_kv=True, target="both", causal=["threshold"]),
        documents() | padding(),
    ),
    "kept keys, window": (replace(routed(keep_kv=True), sliding_window=5), {}),
    "fixed score": (routed(score="fixed"), {}),
    "random score": (routed(score="random"), {}),
    "oracle score": (routed(score="oracle_norm"), {}),
    "oracle score, both parts": (routed(score="oracle_norm", target="both"), {}),
    "sigmoid gate": (routed(gate="sigmoid", gate_scale=True), {}),
    "tanh gate": (routed(gate="tanh", gate_scale=True), {}),
    "no gate": (routed(gate="none"), {}),
    "scaled": (routed(score="fixed", gate_scale=True), {}),
    "token choice, both parts": (routed(choice="token", target="both", capacity_factor=1), {}),
    "token choice, documents": (routed(choice="token"), documents()),
    "token choice, padding": (routed(choice="token"), padding()),
    "padding": (routed(causal=["threshold"]), padding()),
    "padding at the end": (routed(causal=["threshold"]), padding_at_the_end()),
    "documents, padding": (routed(causal=["threshold"]), documents() | padding()),
    "convolution": (replace(routed(), mixer="convolution"), {}),
    "convolution, documents": (replace(routed(), mixer="convolution"), documents()),
    "two mixers": (replace(routed(), mixer=["attention", "convolution"]), {}),
    "graded": (replace(routed(), pattern="cosine", num_layers=4), {}),
    "dense, documents": (small(num_layers=2, pattern="dense"), documents()),
    "one expert a token": (replace(mixed(top_k=1), activation="gelu"), {}),
    "limited experts": (mixed(capacity_factor=0.7, noop=1), {}),
    "limited experts, padding": (mixed(capacity_factor=0.7, noop=1), padding()),
    "balance bias": (mixed(balance="bias", noop=1), {}),
    "expert choice": (mixed(choice="expert", shared=1), {}),
    "expert choice, padding": (mixed(choice="expert", noop=1), padding()),
    "experts, padding": (mixed(noop=1), padding()),
    "staged MoDE": (mixed("every_other", noop=1), {}),
    "staged MoDE, documents": (mixed("every_other", balance="bias"), documents()),
    "loss by chunks": (replace(routed(), loss_chunk=24), {}),
    "loss by chunks, tied": (replace(routed(), loss_chunk=24, tie_embeddings=True), {}),
    "window, normed keys": (small(num_layers=2, sliding_window=8, qk_norm=True), {}),
}
# In the commit tier, which together have every way to choose and to mix.
COMMIT = (
    *(*PATTERNS, "both parts", "documents", "attention's router", "random score", "two mixers"),
    *("token choice, both parts", "expert choice", "window, normed keys", "kept keys"),
)
# Inductor has got the gradient of an experts' router wrong before, with losses and choices equal.
INDUCTED = [
    *("dense", "every_other", "both parts", "token choice", "documents", "experts"),
    *("staged MoDE, expert choice", "limited experts"),
    *("MLP score", "attention score", "oracle score", "tanh gate", "documents, padding"),
    *("token choice, documents", "convolution, documents", "expert choice"),
    *("loss by chunks", "kept keys, window"),
]


class Step(NamedTuple):
    """What one step gives. decided: who was chosen, and what each expert took."""

    losses: Tensor
    decided: list[Tensor]
    gradients: dict[str, Tensor | None]
    observed: list[Tensor]


def step(model: Transformer, call, autocast: bool = False, **kwargs) -> Step:
    """Losses, choices and every gradient, of one step through ``call``."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = call(random_tokens(BATCH, LENGTH), random_tokens(BATCH, LENGTH, 1), **kwargs)
        losses = torch.stack([output.loss, *output.auxiliary.values()])
    losses.sum().backward()
    decided = [record.chosen_BS for record in output.routing]
    for record in output.experts:
        decided += [record.load, record.executed_E, record.dropped]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return Step(losses.detach(), decided, gradients, model.batch_stats(output))


def assert_same(actual: Step, expected: Step, rtol: float) -> None:
    torch.testing.assert_close(actual.losses, expected.losses, rtol=rtol, atol=rtol)
    for one, two in zip(actual.decided, expected.decided, strict=True):
        assert torch.equal(one, two)
    torch.testing.assert_close(actual.observed, expected.observed, rtol=rtol, atol=rtol)
    for name, wanted in expected.gradients.items():
        gradient = actual.gradients[name]
        if wanted is None:
            # Of what only reaches the records the compiler makes zeros.
            assert gradient is None or not gradient.any(), name
            continue
        assert gradient is not None, name
        scale = float(wanted.abs().max())
        error = float((gradient - wanted).abs().max())
        assert error <= rtol * scale, f"{name}: {error / scale:.1e}"


def assert_compiled_equals_eager(
    model: Transformer, backend: str, autocast: bool = False, rtol: float = 1e-4, **given
) -> None:
    """In one graph, also after thresholds and biases have moved."""
    counter = CompileCounterWithBackend(backend)
    call = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for _ in range(2):
        expected = step(model, model, autocast, **given)
        assert_same(step(model, call, autocast, **given), expected, rtol)
        model.update_running_stats(expected.observed)
    assert counter.frame_count == 1


def assert_variant(name: str, backend: str) -> None:
    config, given = VARIANTS[name]
    model = lively(config, dtype=torch.float32)
    assert_compiled_equals_eager(model, backend, **given)


@pytest.mark.slow
@pytest.mark.on_commit(*COMMIT)
@pytest.mark.parametrize("name", slow_but(PATTERNS, VARIANTS))
def test_a_step_is_one_graph_equal_to_eager(name):
    assert_variant(name, "aot_eager")


@pytest.mark.slow
def test_a_router_on_no_path_to_the_loss_trains_compiled_as_it_does_in_eager():
    model = lively(routed(score="mlp", hidden_dim=6, gate="none"), dtype=torch.float32)
    call = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    trained = []
    for forward in (model, call):
        weights = {name: p.clone() for name, p in model.state_dict().items()}
        step(model, forward)
        build_optimizer(model, OptimizerConfig()).step()
        trained.append(model.layers[1].router.hidden.weight.clone())
        model.load_state_dict(weights)
    assert torch.equal(*trained)


def schedule(levels: int) -> list[tuple[float | None, ...]]:
    """Capacities of a model with one routed layer, from all tokens down."""
    return [(1 - level / (2 * levels),) for level in range(levels)]


def check_graphs(monkeypatch, schedule: list[tuple[float | None, ...]]) -> None:
    """Compile as training does, and go through the schedule twice."""
    model = lively(small(num_layers=1, pattern="every"), dtype=torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    call = compile_model(model, len(schedule))
    tokens_BS = random_tokens(BATCH, LENGTH)
    for times in range(2):
        for stage, capacities in enumerate(schedule):
            with torch.no_grad():
                expected = model(tokens_BS, tokens_BS, capacities=capacities)
                actual = call(tokens_BS, tokens_BS, capacities=capacities)
            torch.testing.assert_close(actual.loss, expected.loss)
            assert torch.equal(actual.routing[0].chosen_BS, expected.routing[0].chosen_BS)
            assert counter.frame_count == (len(schedule) if times else stage + 1)


@pytest.mark.slow
def test_each_stage_of_the_capacities_is_compiled_once(monkeypatch):
    check_graphs(monkeypatch, schedule(4))


@pytest.mark.nightly
def test_more_stages_than_the_compilers_own_limit_of_graphs(monkeypatch):
    assert torch._dynamo.config.recompile_limit < 10
    check_graphs(monkeypatch, schedule(10))


@pytest.mark.nightly
def test_more_models_in_a_process_than_the_compilers_own_limit_of_graphs(monkeypatch):
    for _ in range(torch._dynamo.config.recompile_limit // 2 + 1):
        with monkeypatch.context() as patch:
            check_graphs(patch, schedule(2))


@pytest.mark.slow
@pytest.mark.on_commit("every_other")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_step_under_autocast_is_one_graph_equal_to_eager(pattern):
    model = Transformer(small(num_layers=2, pattern=pattern, init_std=0.2))
    # bfloat16 keeps eight bits: the same graph, rounded at other places.
    assert_compiled_equals_eager(model, "aot_eager", autocast=True, rtol=0.05)


@pytest.mark.on_commit("dense", "both parts")
@pytest.mark.slow
@pytest.mark.parametrize("name", INDUCTED)
def test_inductors_step_equals_eager(name):
    assert_variant(name, "inductor")


@pytest.mark.nightly
def test_inductors_random_scores_are_one_graph_that_draws_anew():
    """Its generator is not eager's: other tokens are chosen, as many of them."""
    config, _ = VARIANTS["random score"]
    model = lively(config, dtype=torch.float32)
    call = torch.compile(model, backend="inductor", fullgraph=True, dynamic=False)
    tokens_BS = random_tokens(BATCH, LENGTH)
    one, two = (call(tokens_BS, tokens_BS).routing[0].chosen_BS for _ in range(2))
    assert not torch.equal(one, two)
    assert (one.sum(dim=1) == LENGTH // 4).all()
    assert (two.sum(dim=1) == LENGTH // 4).all()


@pytest.mark.nightly
def test_inductors_step_under_autocast_is_near_eager():
    """Fused kernels round to bfloat16 less often, so two near scores may change places: the choice
    and with it single gradients differ, the losses hardly do."""
    model = Transformer(small(init_std=0.2))
    expected = step(model, model, autocast=True)
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    actual = step(model, compiled, autocast=True)
    torch.testing.assert_close(actual.losses, expected.losses, rtol=0.02, atol=0)
    for one, two in zip(actual.decided, expected.decided, strict=True):
        assert torch.equal(one.sum(dim=1), two.sum(dim=1))
        assert (one == two).double().mean() > 0.9
    assert all(gradient.isfinite().all() for gradient in actual.gradients.values())


@pytest.mark.parametrize("pattern", ["dense", "every_other"])
def test_autocast_keeps_the_residual_stream_and_the_scores_wide(pattern):
    model = Transformer(small(pattern=pattern))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(random_tokens(2, 16), random_tokens(2, 16, 1))
    assert output.loss.dtype == torch.float32
    assert all(record.scores_BS.dtype == torch.float32 for record in output.routing)
    assert all(record.predictor_BS.dtype == torch.float32 for record in output.routing)
