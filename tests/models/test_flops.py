"""The formulas of cost against what torch counts, and against the table of the derivation."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import RouterConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.experts.layer import ExpertMLPs
from modtrain.models.flops import (
    Cost,
    Load,
    active_parameters,
    dense_equivalent_flops,
    forward_flops,
    parameters,
    realised_flops,
    training_flops_per_token,
)
from modtrain.models.transformer import Transformer
from tests.helpers.model_cases import configs, quick, random_tokens, small


def matvec(matrix_shape, _vector_shape, **_):
    return 2 * math.prod(matrix_shape)


def measure(config: ModelConfig, batch: int, seq_len: int, backward: bool = False) -> Cost:
    """What torch executes, by part. Backward passes are counted where they ran, in ``mlp``."""
    model = Transformer(config)
    # torch leaves the router's matrix-vector product (aten.mv) uncounted without a formula for it.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mv: matvec})
    tokens_BS = random_tokens(batch, seq_len)
    # Only the math kernel is made of products that the counter knows on a CPU.
    with sdpa_kernel(SDPBackend.MATH), counter:
        output = model(tokens_BS, tokens_BS if backward else None)
        if backward:
            assert output.loss is not None
            sum(output.auxiliary.values(), output.loss).backward()
    if backward:
        return Cost(mlp=counter.get_total_flops())
    return by_part(counter, model)


# Where a mixer's names stand: in a block, or under a wrapper of its own.
MIXERS = ("module.attention", "attention.module")


def by_part(counter: FlopCounterMode, model: Transformer) -> Cost:
    by_operation = counter.get_flop_counts()
    of = {name: sum(ops.values()) for name, ops in by_operation.items()}
    mixtures = [n for n, module in model.named_modules() if isinstance(module, ExpertMLPs)]
    # What mixtures compute is what nothing else accounts for.
    of = {name: flops for name, flops in of.items() if not name.endswith(tuple(mixtures) or "\0")}

    def ending(*suffixes: str) -> int:
        return sum(flops for name, flops in of.items() if name.endswith(suffixes))

    linear = ("q", "k", "v", "out", "value", "gate")
    mixers = tuple(f".{way}" for way in MIXERS)
    cost = Cost(
        mixer_projections=ending(*(f".{way}.{name}" for way in MIXERS for name in linear)),
        # Batched ones: those of the projections are of two matrices.
        attention_products=sum(
            ops.get(torch.ops.aten.bmm, 0)
            for name, ops in by_operation.items()
            if name.endswith(mixers)
        ),
        mlp=ending(".inner"),
        expert_router=ending(".expert_router"),
        router=ending(".router"),
        predictor=ending(".predictor"),
        head=ending("Transformer.head"),
    )
    rest = counter.get_total_flops() - cost.total
    assert mixtures or rest == 0, "a product outside every part"
    return replace(cost, experts=rest)


@quick(60)
@given(configs(), st.integers(1, 40), st.integers(1, 2))
def test_measured_forward_flops_are_the_formulas_by_part(config, seq_len, batch):
    measured = measure(config, batch, seq_len)
    formula = forward_flops(config, seq_len)
    assert measured.total == pytest.approx(batch * formula.total, rel=0.01)
    # Nothing is approximate about a product's shape, so the parts agree to the last FLOP.
    assert measured.parts() == {part: batch * count for part, count in formula.parts().items()}


@pytest.mark.parametrize(
    "experts",
    [
        ExpertsConfig(count=4),
        ExpertsConfig(count=3, top_k=1, shared=2, dim=5),
        ExpertsConfig(count=4, every=2),
        ExpertsConfig(count=4, capacity_factor=1.25),
        ExpertsConfig(count=3, noop=2, capacity_factor=1.0),
        ExpertsConfig(count=4, noop=4, choice="expert"),
        ExpertsConfig(count=2, shared=2, choice="expert", capacity_factor=0.7),
    ],
    ids=str,
)
@pytest.mark.parametrize("target", ["block", "attention", "mlp"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_measured_flops_of_experts_are_the_formulas(experts, target, activation):
    router = RouterConfig(target=target, causal=["threshold"])
    config = small(experts=experts, router=router, activation=activation, d_ff=48, capacity=0.3)
    assert config.problems() == []
    measured, formula = measure(config, 2, 20), forward_flops(config, 20)
    assert measured.parts() == {part: 2 * count for part, count in formula.parts().items()}
    assert formula.experts
    assert formula.expert_router


def test_no_op_experts_of_a_balanced_load_cost_their_share_less():
    """The formula is half for as many no-ops as experts; what ran follows the choices made."""
    config = small(pattern="dense", experts=ExpertsConfig(count=4, noop=4), num_layers=1)
    plain = small(pattern="dense", experts=ExpertsConfig(count=4), num_layers=1)
    formula, whole = (forward_flops(c, 32).experts for c in (config, plain))
    assert formula * 2 == whole
    model = Transformer(config)
    tokens_BS = random_tokens(4, 32)
    (record,) = model(tokens_BS).experts
    executed = float(record.executed_E.sum()) / 4
    loads = [Load(32, 32 * 32, 32, executed)]
    share = executed / (32 * config.experts.top_k)
    assert realised_flops(config, 32, loads).experts == pytest.approx(whole * share)


@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(score="attention"),
        RouterConfig(score="attention", target="mlp"),
        RouterConfig(score="random"),
        RouterConfig(score="fixed", target="both"),
        RouterConfig(score="oracle_norm"),
        RouterConfig(score="oracle_norm", target="both"),
        RouterConfig(choice="token"),
        RouterConfig(choice="token", capacity_factor=2.0, score="mlp", target="attention"),
    ],
    ids=str,
)
def test_measured_flops_of_every_score_and_choice_are_the_formulas(router):
    config = small(router=router, num_kv_heads=1, d_ff=48)
    assert config.problems() == []
    assert measure(config, 2, 24).total == 2 * forward_flops(config, 24).total


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_padding_slots_are_sent_to_no_expert(capacity_factor):
    """In the first step token choice takes just k tokens, in slots for half as many again."""
    router = RouterConfig(choice="token", capacity_factor=1.5)
    experts = ExpertsConfig(count=4, capacity_factor=capacity_factor)
    config = small(pattern="every", capacity=0.5, router=router, experts=experts)
    measured, formula = measure(config, 2, 24), forward_flops(config, 24)
    assert measured.parts() == {part: 2 * count for part, count in formula.parts().items()}


@pytest.mark.parametrize("score", ["linear", "attention", "oracle_norm"])
def test_an_unused_score_is_neither_computed_nor_counted(score):
    router = RouterConfig(score=score, gate="none", predictor_dim=8)
    config = small(router=router, pattern="every_other")
    model = Transformer(config)
    for depth in model.routers:
        torch.nn.init.constant_(depth.predictor.out.bias, 1e3)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mv: matvec})
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(random_tokens(1, 24), selection="predictor")
    everyone = [Load(24, 24 * 24, 24)] * config.num_layers
    assert counter.get_total_flops() == realised_flops(config, 24, everyone, "predictor").total


@quick(20)
@given(configs(), st.integers(4, 24))
def test_the_dense_equivalent_is_the_cost_of_the_dense_model(config, seq_len):
    equivalent = dense_equivalent_flops(config, seq_len)
    config.pattern = "dense"
    assert equivalent == forward_flops(config, seq_len)
    assert equivalent.router == equivalent.predictor == 0


@pytest.mark.parametrize("causal", [[], ["predictor"]])
def test_training_flops_are_an_upper_bound_short_of_two_products(causal):
    """Backward = 2 x forward holds but for what never runs: no gradient enters a predictor's input,
    and the gradient of a router's input is an outer product, which torch does not count."""
    d, width, seq_len, num_routed = 64, 8, 128, 2
    config = ModelConfig(
        d_model=d,
        num_layers=4,
        num_heads=2,
        vocab_size=256,
        router=RouterConfig(causal=causal, predictor_dim=width),
    )
    measured = measure(config, 1, seq_len, backward=True).total
    formula = seq_len * training_flops_per_token(config, seq_len)
    assert measured == pytest.approx(formula, rel=0.01)
    never_run = num_routed * 2 * seq_len * d * (1 + (width if causal else 0))
    assert measured == formula - never_run


def test_realised_flops_follow_the_mean_of_squares():
    config = ModelConfig(d_model=32, num_layers=2, num_heads=2, vocab_size=64)
    # One sequence sends 2 tokens through the second layer, the other 6.
    everyone = Load(16, 256, 16)
    mean = realised_flops(config, 16, [everyone, Load(4, 20, 4)])
    two, six = (realised_flops(config, 16, [everyone, Load(k, k * k, k)]) for k in (2, 6))
    assert 2 * mean.total == two.total + six.total
    assert forward_flops(config, 16) == two


@quick(60)
@given(configs())
def test_parameters_are_counted_exactly_by_part(config):
    counts = dict.fromkeys(Cost().parts(), 0)
    for name, parameter in Transformer(config).named_parameters():
        counts[part_of(name)] += parameter.numel()
    assert parameters(config).parts() == counts


@pytest.mark.parametrize("noop", [0, 3])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_parameters_of_experts_are_counted(noop, activation):
    experts = ExpertsConfig(count=5, noop=noop, shared=1, top_k=3, every=2, dim=7)
    config = small(experts=experts, activation=activation)
    model = Transformer(config)
    counts = parameters(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert len(model.mixtures) == 2
    weights = [m.expert_router.weight.numel() for m in model.mixtures]
    assert counts.expert_router == sum(weights) == 2 * (5 + noop) * 16


def part_of(name: str) -> str:
    if name.endswith(".gain"):
        return "norms"
    if name.endswith("gate.scale"):
        return "router"
    for place in ("router", "predictor", "embedding", "head", "inner"):
        if f".{place}." in f".{name}":
            return "mlp" if place == "inner" else place
    assert ".attention." in name
    return "mixer_projections"


TABLE = [  # d, S, L, V, rho, model, with head
    (1024, 2048, 16, 32000, 0.0977, 0.549, 0.598),
    (256, 512, 8, 4096, 0.0979, 0.549, 0.599),
    (128, 256, 8, 256, 0.0981, 0.549, 0.556),
]


@quick(30)
@given(configs(), st.integers(1, 90), st.sampled_from([None, 1, 2]))
def test_a_token_costs_two_flops_for_each_active_parameter_of_a_matrix(config, seq_len, every):
    if every is not None and every <= config.num_layers:
        experts = ExpertsConfig(count=4, top_k=1, dim=8, shared=1, noop=2, every=every)
        config = replace(config, experts=experts)
    active, every_one = active_parameters(config, seq_len), parameters(config)
    flops = forward_flops(config, seq_len).parts()
    parts = ["mlp", "experts", "expert_router"]
    # A bias is a parameter, and no product.
    is_counted = set(config.mixers) == {"attention"} and not config.qkv_bias
    parts += ["mixer_projections"] if is_counted else []
    for part in parts:
        # Each layer's count is rounded.
        assert active.parts()[part] == pytest.approx(
            flops[part] / (2 * seq_len), abs=config.num_layers
        ), part
    assert all(active.parts()[part] <= count for part, count in every_one.parts().items())
    if not config.is_routed and config.experts.count is None:
        assert active == every_one


@pytest.mark.parametrize(("d", "seq_len", "layers", "vocab", "rho", "model", "with_head"), TABLE)
def test_the_savings_are_those_of_the_derivation(d, seq_len, layers, vocab, rho, model, with_head):
    """Routed over dense: c(6d + cS)/(6d + S) + 1/(12d + 2S), the MLP being two 4d matrices."""

    def cost(pattern, num_layers=layers):
        config = ModelConfig(
            d_model=d,
            num_layers=num_layers,
            num_heads=4,
            vocab_size=vocab,
            activation="gelu",
            pattern=pattern,
            capacity=0.125,
            router=RouterConfig(causal=[]),
        )
        return forward_flops(config, seq_len)

    def blocks(part: Cost) -> int:
        return part.total - part.head

    one_layer = blocks(cost("every", 1)) / blocks(cost("dense", 1))
    c = 0.125
    formula = c * (6 * d + c * seq_len) / (6 * d + seq_len) + 1 / (12 * d + 2 * seq_len)
    assert one_layer == pytest.approx(formula, rel=1e-12)
    assert one_layer == pytest.approx(rho, abs=5e-5)
    routed, dense = cost("every_other"), cost("dense")
    assert blocks(routed) / blocks(dense) == pytest.approx(model, abs=5e-4)
    assert routed.total / dense.total == pytest.approx(with_head, abs=5e-4)
