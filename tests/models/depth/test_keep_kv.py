"""`router.keep_kv`: the chosen tokens attend to every token before them, against a slow reference.

Shapes: S sequence, D model, W width of a head.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modtrain.models.cache.cache import Cache
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import ComputeBudget, RouterConfig
from modtrain.models.depth.layer import MixtureOfDepths
from modtrain.models.flops import Load, active_parameters, forward_flops, parameters, realised_flops
from modtrain.models.transformer import Transformer
from tests.helpers import reference
from tests.helpers.model_cases import bits, lively, normal, quick, random_tokens, small
from tests.helpers.thresholds import require_margin
from tests.models.cache.cache_cases import alone, assert_each_alone, ready, run_of
from tests.models.depth.choice_cases import masked
from tests.models.test_flops import measure

pytestmark = pytest.mark.usefixtures("_rotary_in_float64")
TARGETS = ["block", "attention", "both"]
SHAPES = {
    "plain": {},
    "grouped, normed keys": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
    "window": {"sliding_window": 5},
}


def keeping(target: str = "block", router: dict | None = None, **changes) -> ModelConfig:
    """A dense layer and a routed one, which keeps keys and values."""
    router = {"predictor_dim": 8, "keep_kv": True, "target": target} | (router or {})
    return small(num_layers=2, **({"router": RouterConfig(**router)} | changes))


def attended(model: Transformer, prefix: str, x_SD: Tensor, at_S: Tensor, sees_SS: Tensor):
    """What each token's query gets from the tokens that it sees: one query after the other."""
    p, c = dict(model.named_parameters()), model.config
    x_SD = reference.rms_norm(x_SD, p[f"{prefix}.norm.gain"], c.norm_eps)
    group, width = c.num_heads // c.kv_heads, c.head_width
    heads = {}
    for name, count in (("q", c.num_heads), ("k", c.kv_heads), ("v", c.kv_heads)):
        for head in range(count):
            x_SW = x_SD @ p[f"{prefix}.{name}.weight"][head * width : (head + 1) * width].T
            if c.qk_norm and name != "v":
                x_SW = reference.rms_norm(x_SW, p[f"{prefix}.{name}_norm.gain"], c.norm_eps)
            heads[name, head] = x_SW if name == "v" else reference.rope(x_SW, at_S, c.rope_theta)
    rows = []
    for query in range(len(x_SD)):
        mixed = []
        for head in range(c.num_heads):
            key_SW, value_SW = heads["k", head // group], heads["v", head // group]
            score_S = key_SW @ heads["q", head][query] / math.sqrt(width)
            weight_S = score_S.masked_fill(~sees_SS[query], -math.inf).softmax(0)
            mixed.append(weight_S @ value_SW)
        rows.append(torch.cat(mixed))
    return torch.stack(rows) @ p[f"{prefix}.out.weight"].T


def who_sees_whom(at_S: Tensor, documents_S: Tensor, valid_S: Tensor, window: int | None) -> Tensor:
    """Every token before, chosen or not, in the window and the document, and itself (S, S)."""
    length = len(at_S)
    sees_SS = torch.eye(length, dtype=torch.bool)
    for query in range(length):
        for key in range(query):
            near = window is None or int(at_S[query] - at_S[key]) < window
            same = int(documents_S[query]) == int(documents_S[key])
            sees_SS[query, key] = near and same and bool(valid_S[key])
    return sees_SS


def slow_layer(model: Transformer, x_SD: Tensor, chosen: list[list[bool]], at_S, sees_SS) -> Tensor:
    """The residual stream after layer 1, whose routers took these tokens."""
    p, c = dict(model.named_parameters()), model.config

    def gated(prefix: str, x_SD: Tensor, update_SD: Tensor, chosen: list[bool]) -> Tensor:
        factor_S = reference.factor(p, prefix, c, x_SD)
        rows = [
            x_SD[i] + factor_S[i] * update_SD[i] if chosen[i] else x_SD[i] for i in range(len(x_SD))
        ]
        return torch.stack(rows)

    if c.router.target == "block":
        prefix = "layers.1.module"
        h_SD = attended(model, f"{prefix}.attention", x_SD, at_S, sees_SS)
        y_SD = h_SD + reference.mlp(p, f"{prefix}.mlp", c, x_SD + h_SD)
        return gated("layers.1.", x_SD, y_SD, chosen[0])
    update_SD = attended(model, "layers.1.attention.module", x_SD, at_S, sees_SS)
    x_SD = gated("layers.1.attention.", x_SD, update_SD, chosen[0])
    update_SD = reference.mlp(p, "layers.1.mlp.module", c, x_SD)
    if c.router.target == "attention":
        return x_SD + update_SD
    return gated("layers.1.mlp.", x_SD, update_SD, chosen[1])


def layer_input(model: Transformer, *args, **kwargs):
    """What comes into layer 1 and out of it, and what the model returned."""
    seen = []
    layer = model.layers[1]
    hook = layer.register_forward_hook(lambda _m, given, out: seen.append((given[0], out)))
    output = model(*args, **kwargs)
    hook.remove()
    return *seen[0], output


@quick(25)
@given(
    st.sampled_from(TARGETS),
    st.sampled_from([*SHAPES]),
    st.sampled_from(["top_k", "predictor", "threshold"]),
    st.booleans(),
    st.sampled_from([None, "left", "right", "any"]),
    st.integers(0, 9),
)
def test_a_layer_equals_the_reference(target, shape, selection, has_documents, side, seed):
    causal = ["predictor", "threshold"]
    config = keeping(target, {"causal": causal, "gate": "tanh"}, **SHAPES[shape])
    model, tokens_BS = ready(config, 16, seed), random_tokens(2, 14, seed)
    documents_BS = (tokens_BS < 6).long().cumsum(1)
    valid_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    if side is not None:
        valid_BS = masked(2, 14, seed, side)
    x_BSD, actual, output = layer_input(
        model,
        tokens_BS,
        selection=selection,
        documents_BS=documents_BS if has_documents else None,
        valid_BS=None if side is None else valid_BS,
    )
    for row in range(2):
        at_S = (valid_BS[row].long().cumsum(0) - 1).clamp(min=0)
        documents_S = documents_BS[row] if has_documents else torch.zeros_like(at_S)
        sees_SS = who_sees_whom(at_S, documents_S, valid_BS[row], config.sliding_window)
        chosen = [record.chosen_BS[row].tolist() for record in output.routing]
        expected_SD = slow_layer(model, x_BSD[row], chosen, at_S, sees_SS)
        own_S = valid_BS[row]
        torch.testing.assert_close(
            actual.value_BSD[row][own_S], expected_SD[own_S], atol=1e-9, rtol=1e-9
        )


@pytest.mark.parametrize("target", TARGETS)
def test_a_capacity_of_1_is_the_dense_layer_with_the_gate(target):
    """With a factor of 1 the model is the dense one."""
    config = keeping(target, {"gate": "none"}, pattern="every", capacity=1.0)
    model = lively(config)
    dense = Transformer(replace(config, pattern="dense")).double()
    weights = {
        name.replace(".attention.module.", ".attention.").replace(".mlp.module.", ".mlp."): value
        for name, value in model.state_dict().items()
        if ".router." not in name and ".predictor." not in name
    }
    if target != "block":
        weights = {
            name.replace(".attention.", ".module.attention.").replace(".mlp.", ".module.mlp."): v
            for name, v in weights.items()
        }
    dense.load_state_dict(weights)
    tokens_BS = random_tokens(2, 16)
    torch.testing.assert_close(
        model(tokens_BS).logits_BSV, dense(tokens_BS).logits_BSV, atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize("target", TARGETS)
def test_skipped_tokens_stay_bit_identical_and_their_keys_have_gradients(target):
    config = keeping(target)
    model = lively(config, dtype=torch.float32)
    layer = model.layers[1] if target == "block" else model.layers[1].attention
    x_BSD = normal(2, 16, 16, dtype=torch.float32).requires_grad_()
    context = model._context(torch.arange(16)[None], "top_k", None, None, None)
    output = layer(x_BSD, context)
    (record,) = output.routing
    skipped_BS = ~record.chosen_BS
    assert torch.equal(bits(output.value_BSD[skipped_BS]), bits(x_BSD[skipped_BS]))
    output.value_BSD[record.chosen_BS].square().sum().backward()
    last_B = (record.chosen_BS * torch.arange(16)).argmax(1)
    before_BS = skipped_BS & (torch.arange(16) < last_B[:, None])
    assert before_BS.any()
    size_BS = x_BSD.grad.abs().amax(-1)
    assert (size_BS[before_BS] > 0).all()
    assert (size_BS[torch.arange(16) > last_B[:, None]] == 0).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("budget", [None, ComputeBudget(layer_cap=0.3), "none"])
def test_the_cache_has_every_token(target, budget):
    """Whatever is chosen, in whatever pieces, and where nothing is."""
    config = keeping(target)
    model = ready(config, 24)
    if budget == "none":
        budget = ComputeBudget((99.0,) * len(model.routers))
    run = run_of(model, 20, 11, 15, budget=budget, margin=3)
    for counts in ((3, 0, 5), (1, 1, 1), (4, 6, 1), (0, 0, 3), (2, 1, 0)):
        run.step(*counts)
        assert [store.lengths for store in run.cache.layers] == [run.cache.seen] * 2
    before = list(run.cache.seen)
    model.extend(random_tokens(3, 3, 5), run.cache, **run.settings)
    run.cache.truncate(before)
    assert run.cache.layers[1].lengths == before
    run.step(*(length - seen for length, seen in zip((20, 11, 15), before, strict=True)))
    assert_each_alone(run)


@pytest.mark.parametrize("window", [None, 4])
def test_one_token_at_a_time_equals_the_whole(window):
    config = keeping("both", sliding_window=window, num_kv_heads=1)
    model = ready(config, 24)
    run = run_of(model, 18, 18)
    for _ in range(18):
        run.step(1, 1)
    assert_each_alone(run)


def test_a_skipped_token_is_seen_by_later_ones():
    """Without keep_kv it would not be."""
    for keeps in (True, False):
        config = small(
            num_layers=1, pattern="every", router=RouterConfig(score="fixed", keep_kv=keeps)
        )
        model, tokens_S = ready(config, 24), random_tokens(1, 16)[0]
        moved_S = tokens_S.clone()
        moved_S[1] = (tokens_S[1] + 1) % 48
        one, two = (alone(model, text, "causal") for text in (tokens_S, moved_S))
        chosen_S = one.routing[0].chosen_BS[0]
        assert not chosen_S[1]
        assert chosen_S[2:].any()
        require_margin(model, one, "causal", None)
        moved = (one.logits_BSV - two.logits_BSV)[0].abs().amax(-1)
        assert (moved[2:][chosen_S[2:]] > 1e-6).all() == keeps
        assert moved[:1].max() == 0


@quick(15)
@given(st.sampled_from(TARGETS), st.sampled_from([*SHAPES]), st.integers(1, 30), st.integers(1, 2))
def test_flops_and_parameters_are_counted(target, shape, seq_len, batch):
    config = keeping(target, **SHAPES[shape])
    measured, formula = measure(config, batch, seq_len), forward_flops(config, seq_len)
    assert measured.parts() == {part: batch * count for part, count in formula.parts().items()}
    active = active_parameters(config, seq_len)
    assert active.mixer_projections == pytest.approx(
        formula.mixer_projections / (2 * seq_len), abs=2
    )
    assert active.norms <= parameters(config).norms


def test_biases_of_keys_and_values_are_active_for_all_tokens():
    """Width 32: of the routed layer 2 of 16 tokens have a query."""
    config = keeping(d_model=32, num_heads=4, num_kv_heads=4, capacity=0.125)
    plain, biased = (
        active_parameters(replace(config, qkv_bias=has_bias), 16).mixer_projections
        for has_bias in (False, True)
    )
    assert biased - plain == 3 * 32 + 2 * 32 + 32 * 2 // 16


def test_the_mean_of_what_was_chosen_is_the_cost_of_the_mean():
    config = keeping()
    everyone = Load(16, 256, 16)
    two, six = (realised_flops(config, 16, [everyone, Load(k, k * k, k)]) for k in (2, 6))
    mean = realised_flops(config, 16, [everyone, Load(4, 20, 4)])
    assert two.total + six.total == 2 * mean.total
    plain = replace(config, router=replace(config.router, keep_kv=False))
    assert forward_flops(plain, 16).total < forward_flops(config, 16).total


@pytest.mark.parametrize(
    ("changes", "key", "remedy"),
    [
        ({"router": RouterConfig(keep_kv=True, target="mlp")}, "keep_kv", "both"),
        ({"router": RouterConfig(keep_kv=True), "mixer": "convolution"}, "keep_kv", "attention"),
    ],
)
def test_what_has_no_keys_is_refused_with_the_remedy(changes, key, remedy):
    (problem,) = small(**changes).problems()
    assert problem.key == f"model.router.{key}"
    assert remedy in problem.remedy


def test_a_convolution_that_every_token_enters_is_no_hindrance():
    router = RouterConfig(keep_kv=True)
    assert small(router=router, mixer=["convolution", "attention"] * 2).problems() == []


def test_a_module_without_keys_is_refused():
    with pytest.raises(ValueError, match="Linear has no method keys_values"):
        MixtureOfDepths(nn.Linear(4, 4), 4, config=RouterConfig(keep_kv=True))


def test_an_empty_batch_of_padding_stores_nothing():
    model = ready(keeping(), 24)
    cache = Cache(model.config, 2)
    valid_NS = torch.zeros(2, 3, dtype=torch.bool)
    model.extend(random_tokens(2, 3), cache, valid_NS=valid_NS)
    assert cache.layers[1].lengths == [0, 0]
