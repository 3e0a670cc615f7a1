"""What routing promises exactly: who takes part, who stays as it was, who gets a gradient.

Shapes: B batch, S sequence, D model.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modtrain.models.depth.config import RouterConfig
from modtrain.models.depth.layer import MixtureOfDepths
from modtrain.models.transformer import Transformer
from tests.helpers.model_cases import (
    configs,
    context_of,
    lively,
    normal,
    quick,
    random_tokens,
    small,
)


def routed(model: Transformer, layer: int = 1) -> MixtureOfDepths:
    module = model.layers[layer]
    assert isinstance(module, MixtureOfDepths)
    return module


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
