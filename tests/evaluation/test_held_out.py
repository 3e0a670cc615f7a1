from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from modtrain.data.stream.batch import Batch
from modtrain.evaluation.held_out import evaluate
from modtrain.models.config import ModelConfig
from modtrain.models.depth.compute_budget import ComputeBudget
from modtrain.models.depth.config import RouterConfig
from modtrain.models.flops import dense_equivalent_flops, forward_flops
from modtrain.models.transformer import Transformer

SEQ_LEN = 24


def build(pattern="every_other", causal=("predictor",), seed=0):
    config = ModelConfig(
        d_model=32,
        num_layers=4,
        num_heads=2,
        vocab_size=50,
        pattern=pattern,
        capacity=0.25,
        router=RouterConfig(causal=list(causal), predictor_dim=8),
    )
    model = Transformer(config, seed=seed).double()
    for name, parameter in model.named_parameters():
        if ".predictor." in name:
            nn.init.normal_(parameter, std=0.7)
    return model


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    # Batches of unequal size: a mean of means would be wrong.
    return [torch.randint(0, 50, (size, SEQ_LEN + 1), generator=generator) for size in (3, 1, 2)]


def test_losses_are_means_over_tokens_and_scores_match_a_count(batches):
    torch.manual_seed(0)
    model = build()
    found = evaluate(model, map(Batch.from_tokens, batches), nullcontext())
    every = torch.cat(batches)
    inputs, targets = every[:, :-1], every[:, 1:]
    with torch.no_grad():
        top_k = model(inputs, targets)
        causal = model(inputs, targets, selection="predictor")
    assert found.tokens == targets.numel()
    assert found.top_k_loss == pytest.approx(float(top_k.loss))
    assert found.causal_loss == pytest.approx(float(causal.loss))
    assert found.causal_loss != pytest.approx(found.top_k_loss)
    decision = found.decisions["predictor"]
    labels = model.config.routed_labels
    assert labels == ["layer_01", "layer_03"]
    for label, routed, free in zip(labels, top_k.routing, causal.routing, strict=True):
        assert decision.realised_capacity[label] == pytest.approx(
            float(free.chosen_BS.double().mean())
        )
        pairs = list(
            zip(
                (routed.predictor_BS > 0).flatten().tolist(),
                routed.chosen_BS.flatten().tolist(),
                strict=True,
            )
        )
        yes, no = (sum(1 for _, truth in pairs if truth is side) for side in (True, False))
        hits, rejections = pairs.count((True, True)), pairs.count((False, False))
        guesses = sum(1 for guess, _ in pairs if guess)
        scores = decision.agreement[label]
        assert scores.accuracy == pytest.approx((hits + rejections) / len(pairs))
        assert scores.f1 == pytest.approx(2 * hits / (guesses + yes))
        assert scores.balanced_accuracy == pytest.approx((hits / yes + rejections / no) / 2)


@pytest.mark.parametrize("answer", [-9.0, 9.0])
def test_executed_flops_follow_what_the_predictor_says(batches, answer):
    model = build()
    for name, parameter in model.named_parameters():
        if ".predictor.out" in name:
            nn.init.constant_(parameter, answer if name.endswith("bias") else 0)
    found = evaluate(model, map(Batch.from_tokens, batches), nullcontext())
    decision = found.decisions["predictor"]
    assert set(decision.realised_capacity.values()) == {float(answer > 0)}
    routing = sum(
        forward_flops(model.config, SEQ_LEN).parts()[part] for part in ("router", "predictor")
    )
    dense = dense_equivalent_flops(model.config, SEQ_LEN)
    blocks = dense.total - dense.head
    expected = routing + dense.head + blocks * (1.0 if answer > 0 else 0.5)
    assert decision.flops == pytest.approx(expected / SEQ_LEN)


def test_a_dense_model_has_one_loss_and_it_is_causal(batches):
    found = evaluate(build("dense"), map(Batch.from_tokens, batches), nullcontext())
    assert found.top_k_loss is None
    assert found.causal_loss is not None
    assert found.decisions["causal"].flops == found.trained_flops


def test_without_a_causal_decision_there_is_no_causal_loss(batches):
    found = evaluate(build(causal=()), map(Batch.from_tokens, batches), nullcontext())
    assert found.causal_loss is None
    assert found.top_k_loss is not None


def test_the_model_is_left_as_it_was(batches):
    model = build().train()
    evaluate(model, map(Batch.from_tokens, batches), nullcontext())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="no held-out batches"):
        evaluate(model, [], nullcontext())


def test_what_is_asked_for_is_what_is_computed(batches, monkeypatch):
    model = build(causal=("predictor", "auxiliary"))
    whole = evaluate(model, map(Batch.from_tokens, batches), nullcontext())
    seen, forward = [], model.forward

    def counted(*arguments, **named):
        seen.append((arguments[2], named["budget"]))
        return forward(*arguments, **named)

    monkeypatch.setattr(model, "forward", counted)
    some = evaluate(
        model,
        map(Batch.from_tokens, batches),
        nullcontext(),
        selections=["auxiliary"],
        as_trained=False,
    )
    assert seen == [("auxiliary", None)] * len(batches)
    assert some.top_k is None
    expected = replace(whole.decisions["auxiliary"], agreement={})
    assert some.decisions == {"auxiliary": expected}
    assert (some.tokens, some.trained_flops) == (whole.tokens, whole.trained_flops)
    with pytest.raises(ValueError, match="no selection to evaluate"):
        evaluate(
            model, map(Batch.from_tokens, batches), nullcontext(), selections=[], as_trained=False
        )


def test_a_dial_moves_its_decision_and_nothing_else(batches):
    model = build(causal=("predictor", "auxiliary"))
    plain = evaluate(model, map(Batch.from_tokens, batches), nullcontext())
    thresholds = (0.4, -0.3)
    budget = ComputeBudget(thresholds, 0.5, 1)
    moved = evaluate(
        model, map(Batch.from_tokens, batches), nullcontext(), budgets={"predictor": budget}
    )
    assert moved.top_k == plain.top_k
    assert moved.decisions["auxiliary"] == plain.decisions["auxiliary"]
    every = torch.cat(batches)
    inputs, targets = every[:, :-1], every[:, 1:]
    with torch.no_grad():
        trained = model(inputs, targets)
        output = model(inputs, targets, selection="predictor", budget=budget)
    found = moved.decisions["predictor"]
    assert found.loss == pytest.approx(float(output.loss))
    shares = [float(record.chosen_BS.double().mean()) for record in output.routing]
    assert list(found.realised_capacity.values()) == pytest.approx(shares)
    for level, record, scores in zip(
        thresholds, trained.routing, found.agreement.values(), strict=True
    ):
        same = (record.predictor_BS > level) == record.chosen_BS
        assert scores.accuracy == pytest.approx(float(same.double().mean()))


def test_top_k_is_told_with_what_it_took_and_costs(batches):
    model = build()
    top_k = evaluate(model, map(Batch.from_tokens, batches), nullcontext()).top_k
    assert set(top_k.realised_capacity.values()) == {0.25}
    assert top_k.flops == forward_flops(model.config, SEQ_LEN).total / SEQ_LEN
    assert top_k.agreement == {}
