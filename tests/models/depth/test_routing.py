"""What routing promises exactly: who takes part, who stays as it was, who gets a gradient.

Shapes: B batch, S sequence, D model.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modtrain.models.depth.config import RouterConfig
from modtrain.models.depth.layer import MixtureOfDepths
from modtrain.models.depth.selection import top_k
from modtrain.models.transformer import Transformer, is_predictor
from tests.helpers.model_cases import (
    balance_predictors,
    configs,
    context_of,
    distinct_tokens,
    lively,
    normal,
    quick,
    random_tokens,
    small,
)
from tests.helpers.thresholds import require_margin


def routed(model: Transformer, layer: int = 1) -> MixtureOfDepths:
    module = model.layers[layer]
    assert isinstance(module, MixtureOfDepths)
    return module


def bits(x: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().view(integers[x.element_size()])


# Fact 2: exactly k tokens.


@quick(60)
@given(configs(), st.integers(1, 40), st.integers(1, 3), st.booleans())
def test_exactly_k_tokens_take_part(config, seq_len, batch, tied):
    tokens_BS = random_tokens(batch, seq_len)
    if tied:  # one token throughout: in the first layer all the scores are equal
        tokens_BS = torch.zeros_like(tokens_BS)
    routing = Transformer(config)(tokens_BS).routing
    shares = [config.capacities[layer] for layer, _ in config.routed_parts]
    assert len(routing) == len(shares)
    for record, share in zip(routing, shares, strict=True):
        expected = max(1, round(share * seq_len))
        assert record.chosen_BS.sum(dim=1).tolist() == [expected] * batch


@quick(40)
@given(st.integers(1, 30), st.data())
def test_top_k_is_the_largest_scores_in_ascending_order(seq_len, data):
    count = data.draw(st.integers(1, seq_len))
    scores_BS = normal(3, seq_len, seed=seq_len)
    for scores_S, index_K in zip(scores_BS, top_k(scores_BS, count), strict=True):
        assert index_K.tolist() == sorted(set(index_K.tolist()))
        rest_S = torch.ones(seq_len, dtype=torch.bool).index_fill(0, index_K, False)
        if rest_S.any():
            assert scores_S[index_K].min() > scores_S[rest_S].max()


# Fact 3: the others' bits.


@pytest.mark.parametrize("selection", ["top_k", "predictor"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float64, False),
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float32, True),
    ],
    ids=["float64", "float32", "bfloat16", "autocast"],
)
def test_skipped_tokens_leave_bitwise_unchanged(selection, dtype, autocast):
    config = small()
    layer = routed(lively(config, dtype=dtype))
    # Signed zeros and tiny numbers would show an addition of zero or a round trip in precision.
    x_BSD = normal(3, 24, config.d_model, dtype=dtype)
    x_BSD[:, ::2, 0] = -0.0
    x_BSD[:, :, 1] = 1e-30
    context = context_of(config, torch.arange(24)[None], selection=selection)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out_BSD, (record,), *_ = layer(x_BSD, context)
    skipped_BS = ~record.chosen_BS
    assert 0 < skipped_BS.sum() < skipped_BS.numel()
    assert out_BSD.dtype == x_BSD.dtype
    assert torch.equal(bits(out_BSD[skipped_BS]), bits(x_BSD[skipped_BS]))
    assert (out_BSD != x_BSD).any(dim=-1)[record.chosen_BS].all()


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)])
def test_scores_are_kept_wider_than_bfloat16_which_would_make_them_tie(dtype, autocast):
    layer = routed(lively(small(), dtype=dtype))
    x_BSD = normal(2, 200, 16, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        _, (record,), *_ = layer(x_BSD, context_of(small(), torch.arange(200)[None]))
    exact_BS = x_BSD.double() @ layer.router.weight.double()
    torch.testing.assert_close(record.scores_BS.double(), exact_BS, rtol=1e-5, atol=1e-5)
    assert record.scores_BS.dtype == torch.float32
    assert len(record.scores_BS.unique()) == record.scores_BS.numel()


# Fact 4: routing everyone is a dense model.


class One(nn.Module):
    def forward(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.new_ones(x_BSD.shape[:2])


@pytest.mark.parametrize("gate", ["none", "one"])
@pytest.mark.parametrize("selection", ["top_k", "predictor"])
@pytest.mark.parametrize("window", [None, 5])
def test_capacity_one_and_no_gate_is_dense(gate, selection, window):
    shape = {"capacity": 1.0, "sliding_window": window, "num_kv_heads": 1}
    raw_or_none = RouterConfig(gate="raw" if gate == "one" else "none", predictor_dim=8)
    model = lively(small(pattern="every", router=raw_or_none, **shape), dtype=torch.float32)
    dense = Transformer(small(pattern="dense", **shape))
    trunk = {
        name: value
        for name, value in model.state_dict().items()
        if "predictor" not in name and "router" not in name
    }
    dense.load_state_dict(trunk)
    for router in model.routers:
        nn.init.constant_(router.predictor.out.bias, 1e3)
        if gate == "one":
            router.router = One()
    tokens_BS = random_tokens(2, 20)
    actual_BSV = model(tokens_BS, selection=selection).logits_BSV
    torch.testing.assert_close(actual_BSV, dense(tokens_BS).logits_BSV, rtol=1e-6, atol=1e-6)


# Fact 6: how the router learns.


@quick(30)
@given(st.sampled_from([0.1, 0.25, 0.6]), st.integers(3, 24), st.integers(0, 5))
def test_the_router_learns_through_the_chosen_only(capacity, seq_len, seed):
    model = lively(small(capacity=capacity, pattern="every"), seed)
    tokens_BS = distinct_tokens(2, seq_len, seed)
    output = model(tokens_BS, random_tokens(2, seq_len, seed + 1))
    scores = [record.scores_BS for record in output.routing]
    gradients = torch.autograd.grad(output.loss, scores)
    for record, gradient_BS in zip(output.routing, gradients, strict=True):
        assert torch.equal(gradient_BS != 0, record.chosen_BS)


def test_without_the_gate_the_router_gets_no_gradient_at_all():
    weights = {}
    for gate in ("raw", "none"):
        model = lively(small(router=RouterConfig(gate=gate, predictor_dim=8)))
        output = model(random_tokens(2, 16), random_tokens(2, 16, 1))
        (output.loss + output.auxiliary["predictor"]).backward()
        weights[gate] = [router.router.weight for router in model.routers]
        assert all(
            parameter.grad is not None
            for name, parameter in model.named_parameters()
            if "router" not in name
        )
    assert all(weight.grad.abs().min() > 0 for weight in weights["raw"])
    assert all(weight.grad is None or not weight.grad.any() for weight in weights["none"])


# Fact 7: the predictor looks on.


@pytest.mark.parametrize("pattern", ["every", "every_other"])
def test_the_predictor_leaves_the_trunks_gradients_alone(pattern):
    gradients = {}
    for causal in ([], ["predictor"]):
        router = RouterConfig(causal=causal, predictor_dim=8)
        model = Transformer(small(pattern=pattern, router=router, init_std=0.3), seed=5)
        output = model(random_tokens(2, 16), random_tokens(2, 16, 1))
        assert set(output.auxiliary) == set(causal)
        sum(output.auxiliary.values(), output.loss).backward()
        gradients[bool(causal)] = {name: p.grad for name, p in model.named_parameters()}
    trunk = {name: g for name, g in gradients[True].items() if not is_predictor(name)}
    assert trunk.keys() == gradients[False].keys()
    for name, gradient in trunk.items():
        assert torch.equal(bits(gradient), bits(gradients[False][name])), name
    predictors = {name: g for name, g in gradients[True].items() if is_predictor(name)}
    assert len(predictors) == 4 * len(Transformer(small(pattern=pattern)).routers)
    assert all(gradient.abs().sum() > 0 for gradient in predictors.values())


# Fact 8: causal selection looks at no later token; top-k does.

CAUSAL_LENGTH = 24


@functools.cache
def causal_model(pattern: str, window: int | None = None) -> tuple[Transformer, Tensor]:
    model = lively(small(capacity=0.4, pattern=pattern, sliding_window=window), seed=3)
    tokens_BS = random_tokens(2, CAUSAL_LENGTH, seed=3)
    balance_predictors(model, tokens_BS)
    for record in model(tokens_BS, selection="predictor").routing:
        assert 0.4 < record.chosen_BS.double().mean() < 0.6, "too few choices to test"
    return model, tokens_BS


def moved(
    selection: str, position: int, token: int, pattern: str, window: int | None = None
) -> Tensor:
    """How far each position's logits move (S) when the token at ``position`` changes."""
    model, before_BS = causal_model(pattern, window)
    after_BS = before_BS.clone()
    after_BS[0, position] = token
    with torch.no_grad():
        before, after = (
            model(tokens_BS, selection=selection) for tokens_BS in (before_BS, after_BS)
        )
    require_margin(model, before, selection)
    before, after = before.logits_BSV, after.logits_BSV
    # The sequence beside it must not move either, at any position.
    assert (before[1] - after[1]).abs().max() < 1e-9
    return (before[0] - after[0]).abs().amax(dim=-1)


@quick(60)
@given(
    st.integers(0, CAUSAL_LENGTH - 1),
    st.integers(0, 47),
    st.sampled_from(["every", "every_other"]),
    st.sampled_from([None, 4]),
)
def test_causal_mode_never_looks_ahead(position, token, pattern, window):
    moved_S = moved("predictor", position, token, pattern, window)
    assert (moved_S[:position] < 1e-9).all()


def test_top_k_looks_ahead():
    """The positive control: the test above can see a leak where there is one."""
    leaks = [
        float(moved("top_k", position, token, "every_other")[:position].max())
        for position in range(12, CAUSAL_LENGTH)
        for token in (1, 2)
    ]
    assert max(leaks) > 1e-2


def test_a_changed_token_does_move_its_own_logits():
    assert moved("predictor", 10, 7, "every_other")[10] > 1e-2
