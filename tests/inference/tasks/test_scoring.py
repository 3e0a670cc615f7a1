"""Scores through the cache are those of whole texts, one at a time, and so are their FLOPs."""

from contextlib import nullcontext

import pytest
import torch

from modtrain.data.stream.batch import Batch, document_numbers
from modtrain.evaluation.held_out import Part, evaluate
from modtrain.inference.tasks.cost import ForwardCost
from modtrain.inference.tasks.scoring import ScoringConfig, score
from modtrain.models.depth.config import ComputeBudget
from modtrain.models.flops import dense_equivalent_flops
from tests.helpers.model_cases import (
    MODELS,
    balance_predictors,
    lively,
    random_tokens,
    settle,
)

LENGTH, MAX_LENGTH, END = 24, 18, 3
# One of every kind of cache, and of what decides.
CASES = ["dense", "mod", "mod in a window", "separately routed parts", "staged", "kept keys"]


def make(name):
    model = settle(lively(MODELS[name], 0, torch.float32), LENGTH).eval()
    if model.config.is_routed and "predictor" in model.config.router.causal_routers:
        balance_predictors(model, random_tokens(4, LENGTH, 1))
    return model


def make_requests():
    """Shared contexts, choices of one token and of several, short and too long texts."""
    texts = random_tokens(5, LENGTH).tolist()
    requests = [(texts[0][:9], texts[row][9:12]) for row in (1, 2, 3)]
    requests += [(texts[1][:14], [token]) for token in (1, 2, 5)]
    requests += [(texts[2][:1], texts[2][1:4]), (texts[3][:20], texts[3][20:24])]
    requests += [(texts[4][:1], texts[4][1 : MAX_LENGTH + 1]), (texts[0][:9], texts[1][9:11])]
    return requests


@torch.no_grad()
def reference(model, context, continuation, config):
    """Score one text by one forward pass over all of it."""
    read = torch.tensor([[*context, *continuation][-(config.max_length + 1) :][:-1]])
    documents_BS = None if config.end_id is None else document_numbers(read, config.end_id)
    output = model(
        read, selection=config.selection, documents_BS=documents_BS, budget=config.budget
    )
    log_probability_SV = output.logits_BSV[0, -len(continuation) :].log_softmax(-1)
    target_S = torch.tensor(continuation)
    total = float(log_probability_SV.gather(1, target_S[:, None]).sum())
    return total, bool((log_probability_SV.argmax(-1) == target_S).all())


def assert_scores(model, config):
    requests = make_requests()
    scores = score(model, requests, config)
    for request, actual in zip(requests, scores, strict=True):
        log_probability, is_greedy = reference(model, *request, config)
        assert actual.log_probability == pytest.approx(log_probability, abs=2e-4)
        assert actual.is_greedy == is_greedy


@pytest.mark.on_commit("mod", "separately routed parts")
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_whole_texts(name):
    model = make(name)
    for selection in model.config.causal_selections:
        assert_scores(model, ScoringConfig(selection, MAX_LENGTH, batch_size=3))


def test_masked_documents_and_limits_of_compute_are_kept():
    model = make("mod")
    budget = ComputeBudget(layer_cap=0.3, step_cap=1)
    assert_scores(model, ScoringConfig("predictor", MAX_LENGTH, budget=budget, end_id=END))


def test_a_text_in_chunks_has_the_scores_of_the_whole(monkeypatch):
    monkeypatch.setattr("modtrain.inference.tasks.scoring._CHUNK", 4)
    assert_scores(make("mod in a window"), ScoringConfig("predictor", MAX_LENGTH, batch_size=4))


@pytest.mark.parametrize("request_", [([], [1]), ([1], []), ([1], [1] * (MAX_LENGTH + 1))])
def test_what_cannot_be_scored_is_refused(request_):
    with pytest.raises(ValueError, match="there has to be one of each"):
        score(make("dense"), [request_], ScoringConfig("causal", MAX_LENGTH))


@pytest.mark.on_commit("separately routed parts")
@pytest.mark.parametrize("name", ["mod", "separately routed parts", "staged", "integrated"])
def test_flops_are_those_of_an_evaluation(name):
    model = make(name)
    selection = model.config.causal_selections[0]
    tokens_BT = random_tokens(4, LENGTH)
    held_out = evaluate(
        model,
        {"": Part([Batch.from_tokens(tokens_BT)])},
        nullcontext(),
        selections=[selection],
        as_trained=False,
    )
    cost = ForwardCost(model.config, selection)
    requests = [(row[:9], row[9:]) for row in tokens_BT.tolist()]
    score(model, requests, ScoringConfig(selection, LENGTH, batch_size=3), cost)
    assert cost.tokens == 4 * (LENGTH - 1)
    # Each layer's count is rounded to a whole number.
    assert cost.flops / cost.tokens == pytest.approx(held_out.causal.flops, rel=1e-5)
    assert cost.realised_capacity == pytest.approx(held_out.causal.realised_capacity)
    dense = dense_equivalent_flops(model.config, LENGTH - 1).total
    assert cost.dense_equivalent_flops == 4 * dense


def test_what_a_cache_holds_counts_once():
    model = make("mod")
    text = random_tokens(1, LENGTH)[0].tolist()
    whole, shared = (ForwardCost(model.config, "predictor") for _ in range(2))
    config = ScoringConfig("predictor", LENGTH)
    score(model, [(text[:9], text[9:20])], config, whole)
    score(model, [(text[:9], text[9:20])] * 2 + [(text[:9], [4])], config, shared)
    # A second branch begins at the context's last token, which the cache does not have.
    assert (whole.tokens, shared.tokens) == (19, 20)
    assert whole.flops < shared.flops < 1.2 * whole.flops
