"""Calibrated levels against counts; a neutral budget changes nothing.

Shapes: B batch, S sequence, T = S + 1.
"""

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modtrain.common.errors import ConfigError
from modtrain.data.stream.batch import Batch
from modtrain.evaluation.held_out import Part, evaluate
from modtrain.inference.calibration import (
    Calibration,
    make_budget,
    resolve_decisions,
    threshold_for_share,
)
from modtrain.inference.config import ComputeBudgetConfig, EvalRunConfig
from modtrain.models.depth.config import ComputeBudget, RouterConfig
from tests.helpers.model_cases import VOCAB, bits, lively, quick, random_tokens, settle, small

EVERY = ["predictor", "auxiliary", "threshold"]
SEQ_LEN = 24


def build(pattern="[1, .25, .25, .25]", dtype=torch.float64, **router):
    """A model with three routers, whose first layer is dense."""
    config = RouterConfig(**({"predictor_dim": 8, "causal": EVERY} | router))
    return settle(lively(small(pattern=pattern, router=config), 3, dtype), SEQ_LEN)


def text(sequences=8, seed=0, eos_id=None):
    """Batches of unequal size, each sequence with another first token: no values tie."""
    tokens = random_tokens(sequences, SEQ_LEN + 1, seed)
    tokens[:, 0] = torch.arange(sequences) % VOCAB
    return [Batch.from_tokens(part, eos_id) for part in (tokens[:3], tokens[3:])]


def realised(model, batches, selection, budget, **more):
    evaluated = evaluate(
        *(model, {"": Part(batches)}, nullcontext()),
        selections=[selection],
        as_trained=False,
        budgets={} if budget is None else {selection: budget},
        **more,
    )
    return list(evaluated.decisions[selection].realised_capacity.values())


def count_passes(monkeypatch, model):
    """A list that grows by the budget of each forward pass."""
    seen, forward = [], model.forward

    def counted(*arguments, **named):
        seen.append(named.get("budget"))
        return forward(*arguments, **named)

    monkeypatch.setattr(model, "forward", counted)
    return seen


@quick(60)
@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 3.0]) | st.floats(-2, 2), min_size=1),
    st.floats(0, 1, exclude_min=True),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_a_level_takes_as_many_as_equal_values_allow(values, share, dtype):
    value_N = torch.tensor(values, dtype=dtype)
    wanted = max(1, round(share * len(values)))
    possible = {int((value_N > value).sum()) for value in value_N} | {len(values)}
    num_chosen = int((value_N > threshold_for_share(value_N, share)).sum())
    assert num_chosen in possible
    assert abs(num_chosen - wanted) == min(abs(count - wanted) for count in possible)


def test_a_level_is_in_the_middle_and_between_neighbours_takes_the_upper_one():
    assert threshold_for_share(torch.tensor([4.0, 1.0, 2.0, 3.0]), 0.5) == 2.5
    low = torch.tensor(1.0)
    for _ in range(2):
        # The middle rounds to the one whose last bit is 0.
        high = torch.nextafter(low, torch.tensor(2.0))
        pair, low = torch.stack([low, high]), high
        assert int((pair > threshold_for_share(pair, 0.5)).sum()) == 1
    assert threshold_for_share(torch.tensor([4.0, 1.0]), 1e-9) == 2.5


@pytest.mark.parametrize("share", [0.001, 0.0625, 0.3, 0.7, 0.97, 1.0])
@pytest.mark.parametrize("selection", EVERY)
def test_each_router_takes_the_wanted_share_of_the_text_it_was_calibrated_on(selection, share):
    model, batches = build(), text()
    budget = make_budget(model, selection, ComputeBudgetConfig(capacity=share), batches)
    tokens = 8 * SEQ_LEN
    wanted = max(1.0, share * tokens)
    for actual in realised(model, batches, selection, budget):
        assert abs(actual * tokens - wanted) <= max(0.5, 0.01 * wanted) + 1e-6


@pytest.mark.parametrize("target", ["attention", "mlp", "both"])
def test_parts_with_own_routers_are_calibrated_in_running_order(target):
    model, batches = build(target=target), text()
    budget = make_budget(model, "predictor", ComputeBudgetConfig(capacity=0.4), batches)
    assert len(budget.thresholds) == (6 if target == "both" else 3)
    assert realised(model, batches, "predictor", budget) == pytest.approx(
        [0.4] * len(budget.thresholds), abs=0.006
    )


def test_documents_are_masked_as_in_the_evaluation():
    model, batches, settings = build(), text(), ComputeBudgetConfig(capacity=0.3)
    masked = text(eos_id=int(batches[0].inputs_BS[0, 5]))
    budget = make_budget(model, "threshold", settings, masked)
    assert realised(model, masked, "threshold", budget) == pytest.approx([0.3] * 3, abs=0.01)
    assert budget != make_budget(model, "threshold", settings, batches)


@pytest.mark.parametrize("selection", EVERY)
def test_on_other_text_the_share_is_near(selection):
    model = build()
    budget = make_budget(model, selection, ComputeBudgetConfig(capacity=0.3), text(40))
    assert realised(model, text(40, seed=1), selection, budget) == pytest.approx(
        [0.3] * 3, abs=0.06
    )


def test_passes_are_as_many_as_routers_at_most_and_the_first_serves_every_share(monkeypatch):
    model, batches = build(), text()
    calibration = Calibration(model, "predictor", batches)
    first = calibration.budget(0.2)
    seen = count_passes(monkeypatch, model)
    calibration.budget(0.6)
    assert 0 < len(seen) <= 2 * len(batches)
    seen.clear()
    assert calibration.budget(1.0).thresholds == (-math.inf,) * 3
    assert seen == []
    seen.clear()
    assert Calibration(model, "predictor", batches).budget(0.2) == first
    assert len(seen) <= 3 * len(batches)


def test_what_was_asked_for_before_makes_no_difference():
    # Of so many tokens a near share would end at once if it began from where the last one ended.
    model, batches = build(), text(40)
    calibration = Calibration(model, "predictor", batches)
    calibration.budget(0.201)
    assert calibration.budget(0.2) == Calibration(model, "predictor", batches).budget(0.2)


def test_it_ends_once_the_shares_are_near(monkeypatch):
    model, batches = build(), text()
    for router in model.routers:
        # Routers that change nothing hand on what the first pass has seen.
        router.module.attention.out.weight.data.zero_()
        router.module.mlp.inner.down.weight.data.zero_()
    seen = count_passes(monkeypatch, model)
    make_budget(model, "predictor", ComputeBudgetConfig(capacity=0.2), batches)
    assert len(seen) == 2 * len(batches)


@pytest.mark.parametrize("score", ["random", "fixed"])
def test_routers_that_look_at_no_token_take_the_share_itself(score, monkeypatch):
    model = build(score=score, causal=None)
    seen = count_passes(monkeypatch, model)
    budget = make_budget(model, "causal", ComputeBudgetConfig(capacity=0.5))
    assert (budget, seen) == (ComputeBudget((0.5,) * 3), [])
    assert realised(model, text(), "causal", budget) == pytest.approx([0.5] * 3, abs=0.2)
    if score == "fixed":
        assert realised(model, text(), "causal", budget) == [0.5] * 3


def test_a_capacity_is_what_routers_want_and_caps_come_off_it():
    model, batches = build(), text()
    settings = ComputeBudgetConfig(capacity=0.5, layer_cap=0.3, step_cap=2)
    budget = make_budget(model, "predictor", settings, batches)
    assert (budget.layer_cap, budget.step_cap) == (0.3, 2)
    values = Calibration(model, "predictor", batches, caps=budget)._values(budget)
    for value_N, level in zip(values, budget.thresholds, strict=True):
        assert float((value_N > level).double().mean()) == pytest.approx(0.5, abs=0.006)
    assert all(share <= 0.3 for share in realised(model, batches, "predictor", budget))


@pytest.mark.parametrize("selection", EVERY)
def test_a_neutral_budget_changes_no_bit(selection):
    model, tokens = build(dtype=torch.float32), random_tokens(3, SEQ_LEN)
    before = model(tokens, selection=selection)
    assert make_budget(model, selection, ComputeBudgetConfig(decision=selection)) is None
    barely = {"shift": 1e-30} if selection == "predictor" else {"step_cap": 3}
    for changes in ({"layer_cap": 1.0, "step_cap": 3}, barely):
        settings = ComputeBudgetConfig(**changes)
        budget = make_budget(model, selection, settings)
        after = model(tokens, selection=selection, budget=budget)
        assert torch.equal(bits(before.logits_BSV), bits(after.logits_BSV))


@pytest.mark.parametrize("selection", EVERY)
def test_a_shift_is_added_to_the_trained_level(selection):
    model = build()
    trained = [float(router.decision_threshold(selection)) for router in model.routers]
    budget = make_budget(model, selection, ComputeBudgetConfig(shift=0.25))
    assert budget.thresholds == tuple(level + 0.25 for level in trained)
    settings = [ComputeBudgetConfig(shift=shift) for shift in (-1.5, -0.3, 0.3, 1.5)]
    budgets = [make_budget(model, selection, one) for one in settings]
    shares = [realised(model, text(), selection, budget)[0] for budget in budgets]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]


@pytest.mark.parametrize(
    ("model", "settings", "key", "message"),
    [
        ({"pattern": "dense"}, {"capacity": 0.5}, "capacity", "has none"),
        ({"pattern": "dense"}, {"step_cap": 0}, "step_cap", "has none"),
        ({"causal": []}, {"layer_cap": 0.5}, "layer_cap", "trained without"),
        ({"score": "fixed", "causal": None}, {"shift": 0.5}, "shift", "router.score=fixed"),
    ],
)
def test_what_the_model_does_not_have_is_refused(model, settings, key, message):
    routed = build(**model)
    with pytest.raises(ConfigError, match=message) as error:
        make_budget(routed, "predictor", ComputeBudgetConfig(**settings), prefix="draft")
    assert [problem.key for problem in error.value.problems] == [f"draft.{key}"]


def test_calibration_needs_text_and_leaves_the_mode():
    model = build().train()
    with pytest.raises(ValueError, match="no text"):
        make_budget(model, "predictor", ComputeBudgetConfig(capacity=0.5))
    make_budget(model, "predictor", ComputeBudgetConfig(capacity=0.5), text())
    assert model.training


def test_decisions_are_all_or_the_one_named():
    config = build().config
    assert resolve_decisions(ComputeBudgetConfig(), config) == EVERY
    assert resolve_decisions(ComputeBudgetConfig(decision="threshold"), config) == ["threshold"]
    for wrong in ("top_k", "causal"):
        with pytest.raises(ConfigError, match="use one of: predictor, auxiliary, threshold"):
            resolve_decisions(ComputeBudgetConfig(decision=wrong), config)


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({}, []),
        ({"capacity": 1.0, "layer_cap": 0.01, "step_cap": 0}, []),
        (
            {"capacity": 0.0, "layer_cap": 1.5, "step_cap": -1},
            ["capacity", "layer_cap", "step_cap"],
        ),
        ({"capacity": math.nan, "calibration_sequences": 0}, ["capacity", "calibration_sequences"]),
        ({"shift": math.inf}, ["shift"]),
        ({"capacity": 0.5, "shift": -1.0}, ["shift"]),
    ],
)
def test_every_setting_out_of_range_is_reported_under_its_key(settings, keys):
    problems = EvalRunConfig(run="a", inference=ComputeBudgetConfig(**settings)).problems()
    assert [problem.key for problem in problems] == [f"inference.{key}" for key in keys]
