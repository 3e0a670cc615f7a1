"""Scores without weights, and what the gates make of scores.

Shapes: B batch, S sequence, K chosen, D model, W width of a head.
"""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from modtrain.models.attention import Attention
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import SCORES, RouterConfig
from modtrain.models.depth.layer import MixtureOfDepths
from modtrain.models.depth.pattern import num_chosen
from modtrain.models.depth.router import RandomRouter, evenly_spaced_scores
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.sequence import SequenceContext, as_output
from modtrain.models.transformer import Transformer
from tests.helpers import reference
from tests.helpers.model_cases import (
    VOCAB,
    bits,
    context_of,
    distinct_tokens,
    lively,
    normal,
    quick,
    random_tokens,
    small,
)

pytestmark = pytest.mark.usefixtures("_rotary_in_float64")

LEARNED = ["linear", "mlp"]
CONTROLS = ["random", "fixed", "oracle_norm"]


def router_of(score: str, **changes) -> RouterConfig:
    return RouterConfig(score=score, **({"predictor_dim": 8, "hidden_dim": 6} | changes))


def one_layer(
    router: RouterConfig, seed: int = 0, **changes
) -> tuple[MixtureOfDepths, ModelConfig]:
    config = small(router=router, **({"pattern": [0.25], "num_layers": 1} | changes))
    return lively(config, seed).routers[0], config


def seeded(model: Transformer, tokens_BS: Tensor, seed: int = 0, **options):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(tokens_BS, **options)


# Evenly spaced.


@quick(100)
@given(st.integers(1, 70), st.floats(0.01, 1))
@example(1, 0.01)
@example(64, 1.0)
def test_evenly_spaced_scores_choose_exactly_k_at_even_gaps(length, capacity):
    layer, config = one_layer(router_of("fixed", target="mlp"))
    layer.capacity, count = capacity, num_chosen(capacity, length)
    x_BSD = normal(2, length, config.d_model)
    _, (record,), *_ = layer(x_BSD, context_of(config, torch.arange(length)[None]))
    assert torch.equal(record.chosen_BS[0], record.chosen_BS[1])
    place_K = record.chosen_BS[0].nonzero().flatten()
    assert len(place_K) == count
    # The gap across the end counts too: no stretch of the sequence is passed over.
    gap_K = torch.cat((place_K, place_K[:1] + length)).diff()
    assert gap_K.max() - gap_K.min() <= 1


@quick(40)
@given(st.integers(1, 12), st.integers(1, 12))
def test_a_jth_of_the_tokens_is_every_jth(every, count):
    length = every * count
    scores_BS = evenly_spaced_scores(normal(3, length, 4), num_chosen(1 / every, length))
    expected_S = [float(place % every == every - 1) for place in range(length)]
    assert scores_BS.tolist() == [expected_S] * 3


# Random.


def test_random_scores_are_gaussian_and_independent_of_the_tokens():
    torch.manual_seed(0)
    one_BS = RandomRouter()(normal(64, 1000, 2))
    ranked_N = one_BS.flatten().sort().values
    share_N = (torch.arange(len(ranked_N)) + 0.5) / len(ranked_N)
    assert (torch.special.ndtr(ranked_N) - share_N).abs().max() < 0.01
    along, across = torch.corrcoef(one_BS), torch.corrcoef(one_BS.T[:64])
    for correlation in (along, across):
        assert (correlation - torch.eye(64)).abs().max() < 0.6
    torch.manual_seed(0)
    assert torch.equal(RandomRouter()(normal(64, 1000, 2, seed=1)), one_BS)


@pytest.mark.parametrize("target", ["block", "both"])
def test_random_scores_are_new_at_each_call_and_reproduced_by_the_seed(target):
    model = lively(small(router=router_of("random", target=target), pattern="every"))
    tokens_BS = random_tokens(3, 24)
    first, again = (seeded(model, tokens_BS) for _ in range(2))
    later = model(tokens_BS)
    assert torch.equal(first.logits_BSV, again.logits_BSV)
    scores = [record.scores_BS for output in (first, later) for record in output.routing]
    rows = torch.cat(scores)
    assert len(rows.unique(dim=0)) == len(rows), "layers, sequences and calls draw on their own"


# Content-free scores choose causally as they are.


@pytest.mark.parametrize("score", ["random", "fixed"])
@pytest.mark.parametrize("gate", [None, "raw", "tanh"])
@pytest.mark.parametrize("target", ["block", "attention", "mlp", "both"])
def test_content_free_scores_are_causal_as_they_are(score, gate, target):
    router = router_of(score, gate=gate, target=target)
    model = lively(small(router=router, pattern="every", capacity=0.4))
    assert model.config.causal_selections == ["causal"]
    tokens_BS = random_tokens(2, 20)
    before = seeded(model, tokens_BS, selection="causal")
    for position in range(0, 20, 3):
        after_BS = tokens_BS.clone()
        after_BS[0, position] = (after_BS[0, position] + 5) % VOCAB
        after = seeded(model, after_BS, selection="causal")
        moved_BS = (after.logits_BSV - before.logits_BSV).abs().amax(dim=-1)
        assert (moved_BS[0, :position] < 1e-9).all()
        assert moved_BS[0, position] > 1e-3
        assert (moved_BS[1] < 1e-9).all()
    if score == "fixed":
        trained = seeded(model, tokens_BS)
        assert torch.equal(before.logits_BSV, trained.logits_BSV), "and choose as in training"


# Attention that a token received.


def received(
    p: dict[str, Tensor], prefix: str, c: ModelConfig, x_SD: Tensor, sequence: reference.Sequence
) -> list[float]:
    """Query by query and head by head: the mean over the queries that see a token."""
    length, width = len(x_SD), c.head_width
    x_SD = reference.rms_norm(x_SD, p[f"{prefix}.norm.gain"], c.norm_eps)
    sees_SS = reference.visible([True] * length, sequence, c.sliding_window).tolist()
    received_by: list[list[float]] = [[] for _ in range(length)]
    for head in range(c.num_heads):
        shared = head * c.kv_heads // c.num_heads
        turned = {}
        for name, number in (("q", head), ("k", shared)):
            weight = p[f"{prefix}.{name}.weight"][number * width : (number + 1) * width]
            of_SW = x_SD @ weight.T
            if c.qk_norm:
                of_SW = reference.rms_norm(of_SW, p[f"{prefix}.{name}_norm.gain"], c.norm_eps)
            turned[name] = reference.rope(of_SW, sequence.at_S, c.rope_theta)
        logits = (turned["q"] @ turned["k"].T / math.sqrt(width)).tolist()
        for query in range(length):
            keys = [key for key in range(length) if sees_SS[query][key]]
            total = sum(math.exp(logits[query][key]) for key in keys)
            for key in keys:
                received_by[key].append(math.exp(logits[query][key]) / total)
    return [sum(weights) / len(weights) for weights in received_by]


@quick(15)
@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([None, 1, 3, 50]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["block", "attention", "both", "mlp"]),
    st.integers(1, 14),
    st.integers(0, 9),
)
def test_attention_scores_equal_a_loop(kv_heads, window, qk_norm, several, target, length, seed):
    config = small(
        num_heads=4,
        num_kv_heads=kv_heads,
        sliding_window=window,
        qk_norm=qk_norm,
        router=router_of("attention", target=target),
        pattern="[1, .25, .25, .25]" if target == "mlp" else "every_other",
    )
    assert not config.problems()
    model = lively(config, seed)
    tokens_BS = distinct_tokens(2, length, seed)
    documents_BS = (random_tokens(2, length, seed) % 4 == 0).long().cumsum(1) if several else None
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda _, args, at=name: inputs.update({at: args[0]}))
    with torch.no_grad():
        routing = model(tokens_BS, documents_BS=documents_BS).routing
    p = dict(model.named_parameters())
    names = list(inputs)
    for record, (layer, part) in zip(routing, config.routed_parts, strict=True):
        before = names[layer - 1]
        for row in range(2):
            documents = [0] * length if documents_BS is None else documents_BS[row].tolist()
            sequence = reference.Sequence(torch.arange(length), documents)
            expected = received(p, before, config, inputs[before][row], sequence)
            actual_S = record.scores_BS[row]
            torch.testing.assert_close(
                actual_S, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10
            )
            # Where a window leaves nothing to attend to, scores tie, and any of the best will do.
            best_S = torch.tensor(reference.largest(actual_S, 0.25, documents))
            taken_S = record.chosen_BS[row]
            assert torch.equal(actual_S[taken_S].sort().values, actual_S[best_S].sort().values), (
                part
            )


def test_the_attention_score_passes_no_gradient_to_the_layer_before():
    model = lively(small(router=router_of("attention")))
    output = model(random_tokens(2, 12), random_tokens(2, 12, 1))
    assert not any(record.scores_BS.requires_grad for record in output.routing)


def test_the_attention_score_is_computed_in_training_alone():
    model = lively(small(router=router_of("attention")))
    computed = []
    model.layers[0].module.attention.register_forward_hook(
        lambda _module, _inputs, output: computed.append(as_output(output).received_BS is not None)
    )
    for selection in ("top_k", "predictor"):
        routing = model(random_tokens(2, 12), selection=selection).routing
        for record in routing:
            assert bool(record.scores_BS.any()) == (selection == "top_k")
    assert computed == [True, False]


# The size of the update.


@quick(25)
@given(
    st.sampled_from(["block", "attention", "mlp", "both"]),
    st.sampled_from(["attention", "convolution"]),
    st.sampled_from([None, "raw"]),
    st.booleans(),
    st.integers(1, 16),
    st.integers(0, 9),
)
def test_the_oracle_score_is_the_norm_of_the_update(target, mixer, gate, several, length, seed):
    router = router_of("oracle_norm", target=target, gate=gate)
    config = small(router=router, mixer=mixer, pattern=[0.3], num_layers=1)
    x_BSD = normal(2, length, config.d_model, seed=seed).requires_grad_()
    documents = (random_tokens(1, length, seed)[0] % 4 == 0).long().cumsum(0)
    context = context_of(
        config, torch.arange(length)[None], documents_BS=documents[None] if several else None
    )
    for (_, part), layer in zip(config.routed_parts, lively(config, seed).routers, strict=True):
        p = dict(layer.named_parameters())
        _, (record,), *_ = layer(x_BSD, context)
        assert not record.scores_BS.requires_grad
        everyone = [True] * length
        sequence = reference.Sequence(
            torch.arange(length), documents.tolist() if several else [0] * length
        )
        for row in range(2):
            update_SD = reference.update(p, part, "module", config, x_BSD[row], everyone, sequence)
            expected_S = update_SD.detach().square().sum(dim=1).sqrt()
            torch.testing.assert_close(record.scores_BS[row], expected_S, rtol=1e-10, atol=1e-10)
            best = reference.largest(record.scores_BS[row], 0.3, sequence.documents)
            assert record.chosen_BS[row].tolist() == best


def test_the_oracle_measures_experts_too():
    experts = ExpertsConfig(count=4, noop=1, top_k=1)
    layer, config = one_layer(router_of("oracle_norm"), experts=experts)
    x_BSD, context = normal(2, 12, 16), context_of(config, torch.arange(12)[None])
    output = layer(x_BSD, context)
    expected_BSD = as_output(layer.module(x_BSD, context)).value_BSD
    torch.testing.assert_close(output.routing[0].scores_BS, expected_BSD.norm(dim=-1))
    assert len(output.experts) == 1


# Gates.


def routed_once(
    layer: MixtureOfDepths,
    x_BSD: Tensor,
    context: SequenceContext,
    received_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What comes out, who was chosen, the scores, and the update (N, D) of the chosen by itself."""
    seen: list[Tensor] = []
    handle = layer.module.register_forward_hook(
        lambda _module, _inputs, output: seen.append(as_output(output).value_BSD)
    )
    torch.manual_seed(0)
    out_BSD, (record,), *_ = layer(x_BSD, context._replace(received_BS=received_BS))
    handle.remove()
    return out_BSD, record.chosen_BS, record.scores_BS, seen[-1].flatten(0, 1)


@pytest.mark.parametrize("target", ["block", "attention", "mlp", "both"])
@pytest.mark.parametrize("score", CONTROLS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["raw", "sigmoid", "tanh", "none"])
def test_the_gate_multiplies_the_update_and_nothing_else(kind, scaled, score, target):
    """With learned scores `test_reference` does this for whole models."""
    layer, config = one_layer(router_of(score, gate=kind, gate_scale=scaled, target=target))
    x_BSD = 0.5 * normal(3, 20, config.d_model)
    x_BSD[:, ::2, 0] = -0.0
    context = context_of(config, torch.arange(20)[None])
    out_BSD, chosen_BS, scores_BS, update_ND = routed_once(layer, x_BSD, context)
    score_N = scores_BS[chosen_BS]
    factors = {"raw": score_N, "sigmoid": 1 / (1 + torch.exp(-score_N)), "tanh": score_N.tanh()}
    factor_N = factors.get(kind, torch.ones_like(score_N))
    if scaled:
        assert layer.gate.scale != 1
        factor_N = factor_N * layer.gate.scale
    expected_ND = x_BSD[chosen_BS] + factor_N[:, None] * update_ND
    torch.testing.assert_close(out_BSD[chosen_BS], expected_ND, rtol=1e-12, atol=1e-12)
    assert torch.equal(bits(out_BSD[~chosen_BS]), bits(x_BSD[~chosen_BS]))


@pytest.mark.parametrize("score", SCORES)
def test_learned_scores_multiply_by_default_and_the_others_do_not(score):
    outputs = {}
    for gate in (None, "raw", "none"):
        layer, config = one_layer(router_of(score, gate=gate))
        x_BSD = normal(2, 16, config.d_model)
        context = context_of(config, torch.arange(16)[None])
        received_BS = normal(2, 16, seed=1)
        outputs[gate] = routed_once(layer, x_BSD, context, received_BS)[0]
    # An evenly spaced position's score is 1, which multiplies by nothing.
    assert torch.equal(outputs["raw"], outputs["none"]) == (score == "fixed")
    assert torch.equal(outputs[None], outputs["raw" if score in LEARNED else "none"])


@pytest.mark.parametrize("score", [*LEARNED, *CONTROLS, "attention"])
@pytest.mark.parametrize("kind", ["raw", "sigmoid", "tanh", "none"])
def test_the_gates_scale_learns(kind, score):
    kind = "none" if score == "attention" else kind
    config = small(router=router_of(score, gate=kind, gate_scale=True))
    model = lively(config)
    torch.manual_seed(0)
    model(random_tokens(2, 16), random_tokens(2, 16, 1)).loss.backward()
    for router in model.routers:
        assert router.gate.scale.grad.abs() > 1e-6


def test_a_gates_scale_starts_at_one_and_changes_nothing():
    tokens_BS = random_tokens(2, 16)
    for kind in ("raw", "sigmoid", "tanh", "none"):
        plain, scaled = (
            Transformer(small(router=router_of("linear", gate=kind, gate_scale=has)))
            for has in (False, True)
        )
        assert torch.equal(plain(tokens_BS).logits_BSV, scaled(tokens_BS).logits_BSV)
