from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from modtrain.data.stream.batch import Batch
from modtrain.evaluation.held_out import Part, evaluate
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import RouterConfig
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


def judged(model, batches, **options):
    return evaluate(model, {"": Part(map(Batch.from_tokens, batches))}, nullcontext(), **options)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    # Batches of unequal size: a mean of means would be wrong.
    return [torch.randint(0, 50, (size, SEQ_LEN + 1), generator=generator) for size in (3, 1, 2)]


def test_scores_match_a_count(batches):
    """Losses, costs and capacities are compared in `tests.inference.evaluate.test_evaluate`."""
    model = build()
    actual = judged(model, batches)
    every = torch.cat(batches)
    with torch.no_grad():
        top_k = model(every[:, :-1], every[:, 1:])
    assert actual.tokens == every[:, 1:].numel()
    assert actual.top_k.loss == pytest.approx(float(top_k.loss))
    for label, record in zip(["layer_01", "layer_03"], top_k.routing, strict=True):
        sides = (record.predictor_BS > 0), record.chosen_BS
        pairs = list(zip(*(side_BS.flatten().tolist() for side_BS in sides), strict=True))
        yes, no = (sum(1 for _, truth in pairs if truth is side) for side in (True, False))
        hits, rejections = pairs.count((True, True)), pairs.count((False, False))
        guesses = sum(1 for guess, _ in pairs if guess)
        scores = actual.decisions["predictor"].agreement[label]
        assert scores.accuracy == pytest.approx((hits + rejections) / len(pairs))
        assert scores.f1 == pytest.approx(2 * hits / (guesses + yes))
        assert scores.balanced_accuracy == pytest.approx((hits / yes + rejections / no) / 2)


def test_the_model_is_left_as_it_was(batches):
    model = build().train()
    judged(model, batches)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="no held-out batches"):
        judged(model, [])


def test_what_is_asked_for_is_what_is_computed(batches, monkeypatch):
    model = build(causal=("predictor", "auxiliary"))
    whole = judged(model, batches)
    seen, forward = [], model.forward

    def counted(*arguments, **named):
        seen.append((arguments[2], named["budget"]))
        return forward(*arguments, **named)

    monkeypatch.setattr(model, "forward", counted)
    some = judged(model, batches, selections=["auxiliary"], as_trained=False)
    assert seen == [("auxiliary", None)] * len(batches)
    assert some.top_k is None
    expected = replace(whole.decisions["auxiliary"], agreement={})
    assert some.decisions == {"auxiliary": expected}
    assert (some.tokens, some.trained_flops) == (whole.tokens, whole.trained_flops)
    with pytest.raises(ValueError, match="no selection to evaluate"):
        judged(model, batches, selections=[], as_trained=False)


def test_sources_have_figures_of_their_own_and_the_whole_is_that_of_all_batches(batches):
    model = build(causal=("predictor", "threshold"))
    groups = {"code": batches[:1], "web": batches[1:]}
    parts = {name: Part(map(Batch.from_tokens, group)) for name, group in groups.items()}
    actual = evaluate(model, parts, nullcontext())
    for name, group in groups.items():
        assert actual.sources[name] == judged(model, group)
    whole, expected = replace(actual, sources={}), judged(model, batches)
    assert whole.tokens == expected.tokens
    for selection, decision in expected.decisions.items():
        merged = whole.decisions[selection]
        assert merged.loss == pytest.approx(decision.loss, rel=1e-12)
        assert merged.flops == pytest.approx(decision.flops, rel=1e-12)
        assert merged.agreement == decision.agreement
        assert merged.realised_capacity == decision.realised_capacity
