"""What looks ahead and what does not, over the whole family; and what learns beside the trunk.

Shapes: B batch, S sequence, V vocabulary.
"""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modtrain.data.stream.batch import document_numbers
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import CAUSAL_ROUTERS, RouterConfig
from modtrain.models.depth.router import hash_positions
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.transformer import Transformer, is_predictor
from tests.helpers.model_cases import (
    VOCAB,
    balance_predictors,
    bits,
    lively,
    quick,
    random_tokens,
    settle,
    small,
)
from tests.helpers.thresholds import require_margin

LENGTH = 24
TARGETS = ["block", "attention", "mlp", "both"]
EXPERTS = {
    "dropless": {"count": 4},
    "limited": {"count": 4, "capacity_factor": 0.7},
    "bias": {"count": 3, "balance": "bias", "bias_rate": 0.3, "shared": 2},
    "expert choice": {"count": 4, "choice": "expert"},
    "integrated, token choice": {"count": 3, "noop": 1},
    "integrated, expert choice": {"count": 3, "noop": 1, "choice": "expert"},
}


def routed(experts: str | None = None, pattern: str = "every_other", **router) -> ModelConfig:
    mixture = {} if experts is None else {"experts": ExpertsConfig(**EXPERTS[experts])}
    router = RouterConfig(**({"predictor_dim": 8, "threshold_decay": 0.5} | router))
    config = small(router=router, pattern=pattern, capacity=0.4, num_layers=2, **mixture)
    assert not config.problems()
    return config


def by_depth(**router) -> dict[str, ModelConfig]:
    """Each target, and each kind of experts in routed blocks (staged) or routed MLPs."""
    return (
        {target: routed(target=target, **router) for target in TARGETS}
        | {f"staged, {kind}": routed(kind, **router) for kind in EXPERTS}
        | {f"mlp, {kind}": routed(kind, target="mlp", **router) for kind in EXPERTS}
    )


CASES: dict[str, ModelConfig] = {
    f"{decision}: {name}": config
    for decision in CAUSAL_ROUTERS
    for name, config in by_depth(causal=[decision]).items()
}
CASES |= {f"token choice: {n}": c for n, c in by_depth(choice="token").items()}
CASES |= {kind: routed(kind, pattern="dense") for kind in EXPERTS}
CASES |= {
    "two-layer scores": routed(score="mlp", causal=["threshold"], gate="tanh"),
    "attention's scores": routed(score="attention", gate_scale=True),
    "kept keys": routed(keep_kv=True, causal=["threshold"]),
    "kept keys, separate parts": routed(keep_kv=True, target="both"),
    "the oracle's scores": routed(score="oracle_norm", gate="raw", causal=["threshold"]),
    "the oracle's threshold": routed(score="oracle_norm", causal=["threshold"]),
    "the oracle's token choice": routed(score="oracle_norm", choice="token", target="mlp"),
    "the oracle predicted": routed(score="oracle_norm", gate="sigmoid"),
}
CASES["windows and convolutions"] = routed(target="both", causal=["auxiliary"])
CASES["windows and convolutions"].mixer = ["convolution", "attention"]
CASES["windows and convolutions"].sliding_window = 4


@functools.cache
def model_of(case: str) -> Transformer:
    """A model whose thresholds have learned and whose predictors say yes to half."""
    config = CASES[case]
    model = settle(lively(config, seed=3), LENGTH)
    if "predictor" in config.router.causal_routers and config.is_routed:
        balance_predictors(model, random_tokens(4, LENGTH))
    return model


def decision_of(case: str) -> str:
    return CASES[case].causal_selections[0]


def moved(model: Transformer, selection: str, seed: int = 0) -> Tensor:
    """How far the logits at s (last) move when token t (first) changes (S, S).

    One forward: a sequence for each token changed, beside the one with none.
    """
    tokens_S = random_tokens(1, LENGTH, seed)[0]
    tokens_BS = tokens_S.repeat(LENGTH + 1, 1)
    change_S = 1 + random_tokens(1, LENGTH, seed + 1)[0] % (VOCAB - 1)
    place_S = torch.arange(LENGTH)
    tokens_BS[place_S + 1, place_S] = (tokens_S + change_S) % VOCAB
    with torch.no_grad():
        output = model(tokens_BS, selection=selection)
    require_margin(model, output, selection)
    logits_BSV = output.logits_BSV
    return (logits_BSV[1:] - logits_BSV[:1]).abs().amax(dim=-1)


# Fact 8: causal choices look at no later token; choices in training may.


@pytest.mark.parametrize("case", CASES)
def test_no_causal_choice_looks_ahead(case):
    model = model_of(case)
    for seed in range(2):
        moved_SS = moved(model, decision_of(case), seed)
        assert (moved_SS.tril(-1) < 1e-9).all()
        assert (moved_SS.diagonal() > 1e-4).all(), "a changed token moves its own logits"
        assert (moved_SS.triu(1) > 1e-4).any(), "and later ones"


@pytest.mark.parametrize("case", CASES)
def test_causal_choices_take_some_tokens_and_leave_others(case):
    output = model_of(case)(random_tokens(4, LENGTH, 7), selection=decision_of(case))
    shares = [float(record.chosen_BS.double().mean()) for record in output.routing]
    assert all(0.1 < share < 0.9 for share in shares), shares
    assert len(output.experts) == len(model_of(case).mixtures)
    for record in output.experts:
        computed = float(record.executed_E.sum())
        assert computed > 0 and (record.executed_E > 0).sum() > 1


LOOK_AHEAD = [case for case in CASES if CASES[case].looks_ahead]


@pytest.mark.parametrize("case", LOOK_AHEAD)
def test_the_choices_of_training_that_look_ahead_are_seen_to(case):
    """The positive control: the test above sees a leak where there is one."""
    model = model_of(case)
    leaks = [moved(model, CASES[case].training_selection, seed).tril(-1).max() for seed in range(3)]
    assert max(leaks) > 1e-2


@pytest.mark.parametrize(
    "case", ["dropless", "limited", "bias", "integrated, token choice", "token choice: both"]
)
def test_token_choice_does_not_look_ahead_in_training_either(case, monkeypatch):
    config = CASES[case]
    assert not config.looks_ahead
    model = model_of(case)
    for router in model.routers:
        # Capacity for all: where it runs out, the lowest scores give way to later ones.
        monkeypatch.setattr(router.config, "capacity_factor", 10.0)
    for seed in range(2):
        assert (moved(model, config.training_selection, seed).tril(-1) < 1e-9).all()


@pytest.mark.parametrize("case", CASES)
def test_another_sequence_never_matters(case):
    model = model_of(case)
    for selection in {decision_of(case), CASES[case].training_selection}:
        tokens_BS = random_tokens(4, LENGTH, 5)
        with torch.no_grad():
            batched = model(tokens_BS, selection=selection)
            require_margin(model, batched, selection)
            alone = [model(row[None], selection=selection).logits_BSV for row in tokens_BS]
        assert (batched.logits_BSV - torch.cat(alone)).abs().max() < 1e-9


@pytest.mark.parametrize("router", [{}, {"choice": "token"}, {"causal": ["auxiliary"]}])
@pytest.mark.parametrize("score", ["linear", "mlp", "oracle_norm", "attention"])
def test_a_model_is_evaluated_by_a_decision_that_it_has(router, score):
    router = RouterConfig(score=score, **router)
    config = small(router=router)
    if not config.problems():
        assert config.causal_selections == router.causal_routers != []


# What a model cannot decide by.


@pytest.mark.parametrize(
    "router",
    [
        {"causal": []},
        {"causal": ["auxiliary"]},
        {"causal": ["threshold", "predictor"]},
        {"choice": "token"},
        {"score": "attention"},
    ],
    ids=str,
)
def test_a_decision_that_the_model_lacks_is_refused(router):
    model = Transformer(small(router=RouterConfig(**router)))
    tokens_BS = random_tokens(2, 8)
    record = model(tokens_BS).routing[0]
    trained = model.config.router.causal_routers
    for selection in (*CAUSAL_ROUTERS, "causal"):
        if selection in trained:
            value_BS = model.routers[0].decision_values(
                selection, record.scores_BS, record.predictor_BS
            )
            assert value_BS.shape == tokens_BS.shape
            continue
        with pytest.raises(ValueError, match=f"cannot choose by '{selection}'.*router.causal="):
            model.routers[0].decision_values(selection, record.scores_BS, record.predictor_BS)
        with pytest.raises(ValueError, match=r"cannot choose by|does not tell"):
            model(tokens_BS, selection=selection)


# Fact 7: what learns beside the trunk.


def trunk_gradients(config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    model = Transformer(config, seed=5).to(dtype)
    output = model(random_tokens(2, LENGTH), random_tokens(2, LENGTH, 1))
    sum(output.auxiliary.values(), output.loss).backward()
    return {
        name: bits(parameter.grad)
        for name, parameter in model.named_parameters()
        if not is_predictor(name) and parameter.grad is not None
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [None, "expert choice", "integrated, token choice"])
@pytest.mark.parametrize("target", TARGETS)
def test_predictors_and_thresholds_leave_the_trunks_gradients_alone(target, experts, dtype):
    def gradients(*causal: str) -> dict[str, Tensor]:
        config = routed(experts, target=target, causal=list(causal))
        config.init_std = 0.3
        return trunk_gradients(config, dtype)

    plain = gradients()
    assert any("router" in name for name in plain)
    for causal in (["predictor"], ["threshold"], ["predictor", "threshold"]):
        beside = gradients(*causal)
        assert beside.keys() == plain.keys()
        for name, gradient in beside.items():
            assert torch.equal(gradient, plain[name]), f"{causal}: {name}"
    pulled = gradients("auxiliary")
    assert pulled.keys() == plain.keys()
    changed = {name for name, gradient in pulled.items() if not torch.equal(gradient, plain[name])}
    assert "embedding.weight" in changed
    assert any("router" in name for name in changed)


@pytest.mark.parametrize("experts", [None, "dropless"])
@pytest.mark.parametrize("choice", ["expert", "token"])
def test_only_trainings_own_choice_has_losses_to_learn_from(choice, experts):
    causal = None if choice == "token" else list(CAUSAL_ROUTERS)
    config = routed(experts, choice=choice, causal=causal)
    model = settle(lively(config), LENGTH)
    tokens_BS = random_tokens(2, LENGTH)
    trained = {"balance", "z"} if experts else set()
    if choice == "expert":
        trained |= {"predictor", "auxiliary"}
    for selection in ("top_k", "token", *config.router.causal_routers):
        if selection == "token" and choice == "expert":
            continue
        auxiliary = model(tokens_BS, tokens_BS, selection).auxiliary
        is_training = selection == config.training_selection
        assert set(auxiliary) == (trained if is_training else set()), selection
    assert set(model(tokens_BS, tokens_BS).auxiliary) == trained
    assert model(tokens_BS).auxiliary == {}


@pytest.mark.parametrize("causal", [["auxiliary"], ["predictor"], ["threshold"], []], ids=str)
def test_each_decision_has_its_own_loss(causal):
    model = lively(small(router=RouterConfig(causal=causal, predictor_dim=8)))
    tokens_BS = random_tokens(2, 16)
    output = model(tokens_BS, tokens_BS)
    assert set(output.auxiliary) == set(causal) - {"threshold"}
    assert all(
        (record.quantile is not None) == (causal == ["threshold"]) for record in output.routing
    )
    assert all((r.predictor_BS is not None) == (causal == ["predictor"]) for r in output.routing)


@pytest.mark.parametrize("score", ["random", "fixed"])
def test_content_free_choices_do_not_know_where_documents_end(score):
    """A token that becomes the end of a document moves the share of that document."""
    model = lively(small(router=RouterConfig(score=score)))
    tokens_BS = 1 + random_tokens(2, 24) % (VOCAB - 1)
    ended_BS = tokens_BS.clone()
    ended_BS[:, 13] = 0

    def run(tokens_BS: Tensor) -> Tensor:
        torch.manual_seed(3)
        documents_BS = document_numbers(tokens_BS, eos_id=0)
        output = model(tokens_BS, selection="causal", documents_BS=documents_BS)
        assert all(0 < record.chosen_BS.sum() < 24 for record in output.routing)
        return output.logits_BSV

    with torch.no_grad():
        moved_BS = (run(tokens_BS) - run(ended_BS)).abs().amax(dim=-1)
    assert moved_BS[:, :13].max() < 1e-9
    assert moved_BS[:, 13:].max() > 1e-3


@quick(20)
@given(st.sampled_from([0.05, 0.125, 1 / 3, 0.5, 1.0]), st.integers(0, 20))
def test_scattered_positions_are_independent_draws(share, salt):
    chosen_S = hash_positions(torch.arange(20_000)[None], share, salt)[0].double()
    other_S = hash_positions(torch.arange(20_000)[None], share, salt + 1)[0].double()
    deviation = math.sqrt(share * (1 - share) / 20_000)
    assert abs(chosen_S.mean() - share) <= 4 * deviation
    for pair_S in (chosen_S[1:] * chosen_S[:-1], chosen_S * other_S):
        expected = share**2
        spread = math.sqrt(max(1e-12, expected * (1 - expected)) / len(pair_S))
        assert abs(pair_S.mean() - expected) <= 4 * spread + 1e-9
