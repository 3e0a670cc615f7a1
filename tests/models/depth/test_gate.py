"""The parametrisation of routers and gates: norm of the input, multiplier, offset, rates.

Shapes: B batch, S sequence, D model.
"""

import pytest
import torch
from torch import nn

from modtrain.evaluation.routing_metrics import update_metrics
from modtrain.models.cache.cache import Cache
from modtrain.models.depth.config import RouterConfig
from modtrain.models.depth.layer import MixtureOfDepths
from modtrain.models.depth.router import Gate, LinearRouter, hash_positions, hashed_scores
from modtrain.models.transformer import Transformer, router_parameters
from modtrain.optimizers.config import OptimizerConfig
from modtrain.optimizers.registry import OPTIMIZERS, build_optimizer
from tests.helpers.model_cases import lively, normal, random_tokens, small


def test_scores_of_a_normalised_input_do_not_follow_the_streams_size():
    router = LinearRouter(8, eps=1e-12).double()
    x_BSD = normal(2, 5, 8)
    rms_BS1 = x_BSD.square().mean(dim=-1, keepdim=True).sqrt()
    torch.testing.assert_close(router(x_BSD), (x_BSD / rms_BS1) @ router.weight)
    torch.testing.assert_close(router(1000 * x_BSD), router(x_BSD))


@pytest.mark.parametrize("kind", ["raw", "sigmoid", "tanh"])
@pytest.mark.parametrize("input_norm", [False, True])
def test_the_gate_is_multiplied_and_shifted_before_its_learned_scale(kind, input_norm):
    config = RouterConfig(
        gate=kind, gate_multiplier=2.0, gate_offset=0.5, gate_scale=True, input_norm=input_norm
    )
    plain = Gate(RouterConfig(gate=kind, input_norm=input_norm), 1e-5)
    gate = Gate(config, 1e-5)
    nn.init.constant_(gate.scale, 3.0)
    scores_BS, x_BSD = normal(2, 5, dtype=torch.float32), normal(2, 5, 8, dtype=torch.float32)
    expected_BS = 3 * (2 * plain(scores_BS, x_BSD) + 0.5)
    torch.testing.assert_close(gate(scores_BS, x_BSD), expected_BS)


def test_a_gate_of_two_sigmoids_or_one_and_the_score_starts_near_one():
    for router in (
        RouterConfig(gate="near_one"),
        RouterConfig(gate="sigmoid", gate_multiplier=2.0),
        RouterConfig(gate="raw", gate_offset=1.0),
    ):
        model = Transformer(small(router=router), seed=1)
        for record in model(random_tokens(4, 32)).routing:
            assert 0.9 < update_metrics(record.update_sums_4.tolist())[0] < 1.6


@pytest.mark.parametrize(
    ("score", "spelled_out"),
    [
        ("linear", {"gate": "sigmoid", "gate_multiplier": 2.0, "input_norm": True}),
        ("mlp", {"gate": "sigmoid", "gate_multiplier": 2.0}),
        *((score, {"gate": "none"}) for score in ("fixed", "attention", "oracle_norm")),
    ],
)
def test_near_one_is_two_sigmoids_of_a_normed_input_and_one_for_scores_not_learned(
    score, spelled_out
):
    near_one = RouterConfig(score=score, gate="near_one")
    assert not near_one.problems("router")
    both = (near_one, RouterConfig(score=score, **spelled_out))
    models = [lively(small(router=router)).eval() for router in both]
    near_BSV, spelled_BSV = (model(random_tokens(2, 16)).require_logits() for model in models)
    assert torch.equal(near_BSV, spelled_BSV)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"gate": "near_one", "gate_multiplier": 2.0}, "gate_multiplier"),
        ({"gate": "near_one", "gate_offset": 1.0}, "gate_offset"),
        ({"gate": "none", "gate_offset": 1.0}, "gate_offset"),
        ({"gate": "none", "gate_multiplier": 2.0}, "gate_multiplier"),
        ({"gate_multiplier": 0.0}, "gate_multiplier"),
        ({"score": "mlp", "input_norm": True}, "input_norm"),
    ],
)
def test_settings_without_an_effect_are_refused(changes, key):
    assert [p.key for p in RouterConfig(**changes).problems("router")] == [f"router.{key}"]


def test_hashed_scores_are_gaussian_and_rank_as_the_hash_chooses():
    positions_BS = torch.arange(200_000).unsqueeze(0)
    scores_BS = hashed_scores(positions_BS, salt=3)
    for share in (0.01, 0.125, 0.5):
        chosen_BS = hash_positions(positions_BS, share, salt=3)
        assert scores_BS[chosen_BS].min() >= scores_BS[~chosen_BS].max()
    ranked_N = scores_BS.flatten().sort().values
    share_N = (torch.arange(len(ranked_N)) + 0.5) / len(ranked_N)
    assert (torch.special.ndtr(ranked_N) - share_N).abs().max() < 0.005
    assert scores_BS.isfinite().all()


def test_a_random_gate_is_as_large_when_causal_and_equal_with_a_cache():
    router = RouterConfig(score="random", gate="raw")
    config = small(num_layers=2, pattern="every_other", capacity=0.25, router=router)
    model = lively(config)
    tokens_BS = random_tokens(8, 128)
    with torch.no_grad():
        trained = model(tokens_BS, selection="top_k")
        causal = model(tokens_BS, selection="causal")
        # The mean of the top quarter of Gaussian numbers is 1.27.
        for output in (trained, causal):
            sums = output.routing[0].update_sums_4.tolist()
            assert update_metrics(sums)[0] == pytest.approx(1.27, abs=0.2)
        cache = Cache(config, 8)
        parts = [model.extend(part, cache).logits_BSV for part in tokens_BS.split([100, 27, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), causal.logits_BSV)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_routers_have_a_rate_of_their_own(name):
    router = RouterConfig(score="mlp", gate_scale=True)
    model = Transformer(small(router=router))
    config = OptimizerConfig(name=name, lr=0.1, router_lr=0.01)
    optimizer = build_optimizer(model, config)
    routers = router_parameters(model)
    names = {n for n, p in model.named_parameters() if p in routers}
    assert {n.split(".")[2] for n in names} == {"router", "gate"}
    assert not any("predictor" in n for n in names)
    seen = set()
    for group in optimizer.param_groups:
        own = {p in routers for p in group["params"]}
        assert own == {group["lr"] == 0.01}
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0}
        seen.update(group["params"])
    assert seen == set(model.parameters())
    assert OPTIMIZERS[name].rates(config)["lr_router"] == 0.01
    assert "lr_router" not in OPTIMIZERS[name].rates(OptimizerConfig(name=name))


def test_routers_around_any_module_are_known():
    layer = MixtureOfDepths(nn.Linear(8, 8), 8)
    assert router_parameters(layer) == {layer.router.weight}
