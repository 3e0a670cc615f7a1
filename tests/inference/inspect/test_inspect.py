"""What is found out about each token, against slow loops and evaluations."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modtrain.common.errors import ConfigError
from modtrain.data.stream.batch import Batch
from modtrain.evaluation.held_out import Part, evaluate
from modtrain.inference.config import ComputeBudgetConfig
from modtrain.inference.inspect.inspect import choose_decision, text_windows
from modtrain.inference.inspect.trace import trace
from modtrain.models.depth.config import ComputeBudget
from modtrain.models.flops import dense_equivalent_flops
from tests.helpers.model_cases import quick, random_tokens, small
from tests.inference.inspect.inspect_cases import EVERY, KINDS, SEQ_LEN, model_of, router, traced


@pytest.fixture(scope="module")
def text() -> list[int]:
    """Three windows and a half."""
    return random_tokens(1, 3 * SEQ_LEN + 7, seed=5)[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_of_a_token_is_that_of_a_slow_loop(kind, text):
    model = model_of(kind)
    for selection in model.config.causal_selections:
        trace = traced(model, text, selection)
        assert trace.token_N.tolist() == text
        for start in range(0, len(text), SEQ_LEN):
            window = text[start : start + SEQ_LEN]
            with torch.no_grad():
                output = model(torch.tensor([window]), selection=selection)
            for place, logits_V in enumerate(output.logits_BSV[0].tolist()):
                number = start + place
                total = math.fsum(math.exp(logit) for logit in logits_V)
                log_probs = [logit - math.log(total) for logit in logits_V]
                entropy = -math.fsum(math.exp(log) * log for log in log_probs)
                assert trace.position_N[number] == place
                assert trace.entropy_N[number] == pytest.approx(entropy)
                if number + 1 < len(text):
                    loss = -log_probs[text[number + 1]]
                    assert trace.loss_N[number] == pytest.approx(loss)
                entered = [bool(record.chosen_BS[0, place]) for record in output.routing]
                assert [bool(r.chosen_N[number]) for r in trace.routers] == entered
                assert trace.depths[number] == sum(entered)
        assert math.isnan(trace.loss_N[-1])
        assert trace.mean_loss == pytest.approx(math.fsum(trace.loss_N[:-1]) / (len(text) - 1))
        assert [r.label for r in trace.routers] == model.config.routed_labels


def test_gates_and_updates_are_means_over_the_routed_tokens():
    model = model_of("mod")
    rows = [Batch.from_tokens(random_tokens(1, SEQ_LEN + 1, seed=seed)) for seed in (1, 2)]
    for number, figures in enumerate(trace(model, rows, "auxiliary", nullcontext()).routers):
        gates = []
        for row in rows:
            with torch.no_grad():
                record = model(row.inputs_BS, selection="auxiliary").routing[number]
            gates += record.scores_BS[record.chosen_BS].tolist()
        assert figures.gate_mean == pytest.approx(math.fsum(gates) / len(gates))
        assert figures.update_ratio > 0


@pytest.mark.parametrize("kind", KINDS)
def test_loss_capacity_and_load_are_those_of_an_evaluation(kind):
    model = model_of(kind)
    batches = [random_tokens(4, SEQ_LEN + 1, seed=8)]
    evaluated = evaluate(model, {"": Part(map(Batch.from_tokens, batches))}, nullcontext())
    for selection, decision in evaluated.decisions.items():
        # One by one, so that the loads of unequally busy windows have to be weighed.
        rows = [Batch.from_tokens(row) for batch in batches for row in batch.split(1)]
        ours = trace(model, rows, selection, nullcontext())
        assert ours.mean_loss == pytest.approx(decision.loss)
        assert ours.flops / len(ours.token_N) == pytest.approx(decision.flops)
        dense = dense_equivalent_flops(model.config, SEQ_LEN).total / SEQ_LEN
        assert ours.dense_flops / len(ours.token_N) == pytest.approx(dense)
        for r in ours.routers[:1]:
            # Later ones have another input than under top-k, with which an evaluation compares.
            assert r.agreement == decision.agreement.get(r.label)
        for r in ours.routers:
            assert r.chosen_N.mean() == pytest.approx(decision.realised_capacity[r.label])
            assert math.isnan(r.gate_mean) == (not r.chosen_N.any())
        for mixture in ours.experts:
            load = decision.expert_load[mixture.label]
            # Under expert choice no token is sent to a no-op expert.
            assert load[len(mixture.share_E) :] == [0.0] * (len(load) - len(mixture.share_E))
            assert mixture.share_E.tolist() == pytest.approx(load[: len(mixture.share_E)])
            assert mixture.share_E.sum() == pytest.approx(1)


def test_documents_and_capacities_are_those_of_an_evaluation():
    model = model_of("mod")
    batch = random_tokens(4, SEQ_LEN + 1, seed=8)
    options = {"capacities": [None, 0.5, None, 0.75]}
    window = Batch.from_tokens(batch, int(batch[0, 5]))
    evaluated = evaluate(model, {"": Part([window])}, nullcontext(), **options)
    losses = {name: decision.loss for name, decision in evaluated.decisions.items()}
    for selection, loss in [*losses.items(), ("top_k", evaluated.top_k.loss)]:
        assert trace(
            model, [window], selection, nullcontext(), **options
        ).mean_loss == pytest.approx(loss)


@pytest.mark.parametrize("kind", ["mod", "both parts", "token choice", "staged"])
def test_a_token_is_chosen_where_its_value_is_above_the_threshold(kind, text):
    model = model_of(kind)
    thresholds = set()
    for selection in model.config.causal_selections:
        for r in traced(model, text, selection).routers:
            assert r.decides_by == ("predictor's logit" if selection == "predictor" else "score")
            assert np.array_equal(r.chosen_N, r.value_N > r.threshold)
            thresholds.add(r.threshold)
    assert thresholds - {0.0}


def test_routers_that_look_at_nothing_have_no_values(text):
    for r in traced(model_of("fixed"), text, "causal").routers:
        assert (r.value_N, r.threshold) == (None, None)
        assert r.chosen_N.any()


def test_later_tokens_change_nothing_of_earlier_ones_but_under_top_k():
    model = model_of("mod")
    one = random_tokens(1, SEQ_LEN, seed=1)[0].tolist()
    two = one[:10] + random_tokens(1, SEQ_LEN, seed=2)[0].tolist()[10:]

    def before(tokens, selection):
        trace = traced(model, tokens, selection)
        return np.stack([r.chosen_N[:10] for r in trace.routers]), trace.entropy_N[:10]

    for selection in EVERY:
        assert all(
            np.allclose(a, b)
            for a, b in zip(before(one, selection), before(two, selection), strict=True)
        )
    assert not np.array_equal(before(one, "top_k")[0], before(two, "top_k")[0])


def test_looking_leaves_the_model_and_the_random_state_alone(text):
    model = model_of("mod").train()
    state = torch.random.get_rng_state()
    first = traced(model, text, "predictor")
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    again = traced(model, text, "predictor", batch_size=1)
    assert np.allclose(first.loss_N, again.loss_N, equal_nan=True)
    with pytest.raises(ValueError, match="no text"):
        trace(model, [], "predictor", nullcontext())


@given(st.lists(st.integers(0, 99), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 4))
@quick(40)
def test_windows_have_the_text_once_and_the_next_tokens_as_targets(tokens, seq_len, batch_size):
    windows = list(text_windows(tokens, seq_len, batch_size))
    inputs = [number for side, *_ in windows for number in side.flatten().tolist()]
    targets = [number for _, side, *_ in windows for number in side.flatten().tolist()]
    assert inputs == tokens
    assert targets == [*tokens[1:], -100]
    assert all(side.shape[0] <= batch_size and side.shape[1] <= seq_len for side, *_ in windows)
    assert all(side.shape[1] == seq_len for side, *_ in windows[:-1])


def test_the_first_causal_decision_is_taken_and_top_k_only_by_its_name():
    config = small(**KINDS["mod"])
    assert choose_decision(config, ComputeBudgetConfig()) == "predictor"
    assert choose_decision(config, ComputeBudgetConfig("threshold")) == "threshold"
    assert choose_decision(config, ComputeBudgetConfig("top_k")) == "top_k"
    assert choose_decision(small(pattern="dense"), ComputeBudgetConfig()) == "causal"
    for changes, settings, word in (
        ({"pattern": "dense"}, ComputeBudgetConfig("top_k"), "use one of: causal"),
        ({}, ComputeBudgetConfig("auxiliary"), "use one of: predictor, top_k"),
        ({"router": router(causal=[])}, ComputeBudgetConfig(), "use top_k, which is not causal"),
        ({}, ComputeBudgetConfig("top_k", capacity=0.5), "is not changed by capacity"),
    ):
        with pytest.raises(ConfigError, match=r"inference\.decision") as error:
            choose_decision(small(**changes), settings)
        assert word in str(error.value)


def test_a_budget_moves_the_threshold_and_what_is_routed():
    model = model_of("mod")
    windows = [Batch(random_tokens(2, 24), random_tokens(2, 24, 1))]
    budget = ComputeBudget((0.3, math.inf, -math.inf)[: len(model.routers)])
    moved = trace(model, windows, "predictor", nullcontext(), budget=budget).routers
    for own, level in zip(moved, budget.thresholds, strict=True):
        assert own.threshold == (level if math.isfinite(level) else None)
        assert (own.chosen_N == (own.value_N > level)).all()
