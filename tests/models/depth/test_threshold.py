"""Token choice, and the running threshold that it and sampling go by.

Shapes: B batch, S sequence, K places, D model, V vocabulary.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import RouterConfig
from modtrain.models.depth.layer import MixtureOfDepths
from modtrain.models.depth.pattern import num_chosen
from modtrain.models.depth.selection import quantile, token_choice
from tests.helpers import reference
from tests.helpers.model_cases import bits, context_of, lively, normal, quick, random_tokens, small
from tests.helpers.thresholds import margin
from tests.models.depth.choice_cases import (
    EXPERTS,
    masked,
    model_of,
    nearest,
    settled,
    two_documents,
)

pytestmark = pytest.mark.usefixtures("_rotary_in_float64")

# Token choice.


def slow_token_choice(
    scores: list[float], count: int, num_slots: int, threshold: float | None
) -> list[bool]:
    ranked = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    ranked = [i for i in ranked if scores[i] > -math.inf]
    members = ranked[:count]
    if threshold is not None:
        members = [i for i in ranked if scores[i] > threshold][:num_slots]
    return [i in members for i in range(len(scores))]


@quick(80)
@given(st.data(), st.integers(1, 20), st.integers(0, 99), st.booleans())
def test_token_choice_takes_what_is_above_the_threshold_up_to_its_places(data, length, seed, first):
    count = data.draw(st.integers(1, length))
    num_slots = data.draw(st.integers(count, length))
    scores_BS = normal(3, length, seed=seed)
    if data.draw(st.booleans()):
        scores_BS = scores_BS.masked_fill(~masked(3, length, seed, "any"), -math.inf)
    # A score that equals the threshold is not above it.
    threshold = data.draw(st.sampled_from([-3.0, 0.0, 3.0, float(scores_BS[0, 0])]))
    chosen_BS = token_choice(
        scores_BS,
        count,
        num_slots,
        torch.tensor(threshold, dtype=torch.float64),
        torch.tensor(not first),
    )
    known = None if first else threshold
    expected = [slow_token_choice(row, count, num_slots, known) for row in scores_BS.tolist()]
    assert chosen_BS.tolist() == expected


def token_layer(target: str = "block", **changes) -> tuple[MixtureOfDepths, ModelConfig]:
    router = RouterConfig(choice="token", target=target, **changes.pop("router", {}))
    config = small(router=router, pattern=[0.25], num_layers=1, **changes)
    assert not config.problems()
    return lively(config).routers[0], config


@quick(50)
@given(
    st.sampled_from(["block", "attention", "mlp"]),
    st.sampled_from(["attention", "convolution"]),
    st.sampled_from([None, -9.0, -0.3, 0.4, 9.0]),
    st.sampled_from([1.0, 1.25, 1.6, 9.0]),
    st.integers(1, 18),
    st.booleans(),
)
@example("block", "attention", 9.0, 1.25, 12, False)
@example("block", "attention", -9.0, 1.0, 18, False)
def test_token_choice_equals_reference(target, mixer, threshold, capacity_factor, length, several):
    """The output and every gradient: those above the threshold see one another alone."""
    layer, config = token_layer(
        target, mixer=mixer, router={"capacity_factor": capacity_factor, "gate": "sigmoid"}
    )
    if threshold is not None:
        layer.update_running_stats(torch.tensor(threshold, dtype=torch.float64))
    count = num_chosen(0.25, length)
    num_slots = min(length, math.ceil(capacity_factor * count))
    x_BSD = normal(3, length, 16, seed=length).requires_grad_()
    documents_S = torch.arange(length) // 5 if several else torch.zeros(length).long()
    actual = layer(
        x_BSD,
        context_of(
            config,
            torch.arange(length)[None],
            selection="token",
            documents_BS=documents_S[None] if several else None,
        ),
    )
    record = actual.routing[0]
    if threshold is not None:
        # The layer holds it in float32.
        assume(margin(record.scores_BS, threshold) > 1e-6)
    sequence = reference.Sequence(torch.arange(length), documents_S.tolist())
    p = dict(layer.named_parameters())
    rows = []
    for x_SD, chosen_S in zip(x_BSD, record.chosen_BS, strict=True):
        scores = reference.score(p, "", config, x_SD).tolist()
        expected = slow_token_choice(scores, count, num_slots, threshold)
        assert chosen_S.tolist() == expected
        rows.append(reference.routed_layer(p, "", config, x_SD, sequence, expected, target))
    expected_BSD = torch.stack(rows)
    torch.testing.assert_close(actual.value_BSD, expected_BSD, rtol=1e-10, atol=1e-10)
    weight_BSD = normal(3, length, 16, seed=1)
    leaves = {"input": x_BSD} | p
    gradients = [
        torch.autograd.grad(
            (out_BSD * weight_BSD).sum(), list(leaves.values()), materialize_grads=True
        )
        for out_BSD in (actual.value_BSD, expected_BSD)
    ]
    for name, one, two in zip(leaves, *gradients, strict=True):
        torch.testing.assert_close(
            one, two, rtol=1e-10, atol=1e-10 * float(two.abs().max() + 1), msg=name
        )


@pytest.mark.parametrize("threshold", [None, -9.0, 0.0, 9.0])
def test_token_choice_computes_the_same_number_of_places_whatever_is_chosen(threshold):
    layer, config = token_layer()
    if threshold is not None:
        layer.update_running_stats(torch.tensor(threshold, dtype=torch.float64))
    shapes = []
    layer.module.register_forward_pre_hook(lambda _module, inputs: shapes.append(inputs[0].shape))
    layer(normal(3, 24, 16), context_of(config, torch.arange(24)[None], selection="token"))
    assert shapes == [(3, 8, 16)], "a quarter of 24, and a quarter more"


# The running threshold.


@quick(80)
@given(st.data(), st.integers(1, 3), st.integers(1, 20), st.integers(0, 99))
def test_the_quantile_is_the_middle_of_its_neighbours(data, batch, length, seed):
    count = data.draw(st.integers(1, length))
    side = data.draw(st.sampled_from(["none", "right", "left", "any"]))
    scores_BS = normal(batch, length, seed=seed)
    valid_BS = None if side == "none" else masked(batch, length, seed, side)
    if valid_BS is not None:
        valid_BS[0, 0] = True
    known_BS = torch.ones_like(scores_BS).bool() if valid_BS is None else valid_BS
    ranked = sorted(scores_BS[known_BS].tolist(), reverse=True)
    total = len(ranked)
    above = max(1, nearest(Fraction(total * count, length)))
    edge = float(quantile(scores_BS, count, valid_BS))
    if above < total:
        assert ranked[above] < edge < ranked[above - 1]
        assert sum(score > edge for score in ranked) == above
        middle = np.quantile(ranked, 1 - (above - 0.5) / (total - 1))
        np.testing.assert_allclose(edge, middle, rtol=1e-9, atol=1e-12)
    else:
        assert edge == ranked[-1]


@quick(60)
@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=12), st.sampled_from([0.0, 0.3, 0.9, 0.99])
)
def test_the_threshold_is_a_mean_of_the_past_without_a_pull_to_zero(values, decay):
    layer, _ = token_layer(router={"threshold_decay": decay})
    assert layer.threshold() == 0
    for value in values:
        layer.update_running_stats(torch.tensor(value, dtype=torch.float64))
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    np.testing.assert_allclose(float(layer.threshold()), mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("experts", [None, "expert choice", "integrated"])
def test_each_running_state_learns_from_its_own_record(experts):
    router = {"choice": "token", "target": "both"}
    model = lively(model_of(experts, router=router, pattern="every"))
    output = model(random_tokens(2, 16))
    before = [bits(buffer).clone() for buffer in model.buffers()]
    observed = model.batch_stats(output)
    assert len(observed) == 4 + (0 if experts is None else 2)
    assert all(torch.equal(bits(b), one) for b, one in zip(model.buffers(), before, strict=True))
    model.update_running_stats(observed)
    for router, record in zip(model.routers, output.routing, strict=True):
        torch.testing.assert_close(router.threshold(), record.quantile)
    for mixture, record in zip(model.mixtures, output.experts, strict=True):
        if experts == "expert choice":
            mean_E = mixture.quantile_sum / mixture.quantile_weight
            torch.testing.assert_close(mean_E, record.quantile_E)
        else:
            assert torch.equal(mixture.bias.sign(), (record.load.mean() - record.load).sign())


@pytest.mark.parametrize("capacity", [0.125, 0.5])
def test_the_share_chosen_keeps_to_the_capacity_while_scores_wander(capacity):
    config = small(
        router=RouterConfig(choice="token", target="mlp", threshold_decay=0.6),
        pattern=[capacity],
        num_layers=1,
    )
    layer = lively(config).routers[0]
    # The threshold in training and when judged, and one that learned no more after ten batches.
    shares: dict[str, list[float]] = {"token": [], "threshold": [], "old": []}
    old = torch.zeros(())
    for step in range(60):
        # Scores that spread and shrink, and drift by more than their deviation.
        x_BSD = (1 + 0.2 * math.sin(step)) * normal(8, 64, 16, seed=step)
        x_BSD = x_BSD + step / 50 * layer.router.weight.detach()
        for selection in ("token", "threshold"):
            at = context_of(config, torch.arange(64)[None], selection=selection)
            with torch.no_grad():
                record = layer(x_BSD, at).routing[0]
            shares[selection].append(float(record.chosen_BS.double().mean()))
            if selection == "token":
                observed = layer.batch_stats(record)
        if step == 10:
            old = layer.threshold()
        shares["old"].append(float((record.scores_BS > old).double().mean()))
        layer.update_running_stats(observed)
    off = {name: abs(sum(chosen[10:]) / 50 - capacity) for name, chosen in shares.items()}
    assert off["token"] < 0.03
    assert off["threshold"] < 0.04
    assert off["old"] > 0.12
    assert all(abs(share - capacity) < 0.12 for share in shares["token"])


@pytest.mark.parametrize("experts", [None, *EXPERTS])
@pytest.mark.parametrize(
    "router",
    [{"choice": "token"}, {"causal": ["threshold", "predictor", "auxiliary"]}],
    ids=["token", "expert"],
)
def test_a_forward_pass_leaves_every_running_state_alone(router, experts):
    """Activation checkpointing runs it twice."""
    model = settled(model_of(experts, router=router, pattern="every"))
    before = {name: bits(buffer).clone() for name, buffer in model.named_buffers()}
    assert any(value.any() for value in before.values())
    tokens_BS = random_tokens(2, 16)
    valid_BS = torch.arange(16)[None] < torch.tensor([[16], [9]])
    for selection in (model.config.training_selection, *model.config.router.causal_routers):
        for options in ({}, {"valid_BS": valid_BS}, {"documents_BS": two_documents(16)}):
            output = model(tokens_BS, tokens_BS, selection, **options)
            sum(output.auxiliary.values(), output.loss).backward()
    for name, buffer in model.named_buffers():
        assert torch.equal(bits(buffer), before[name]), name
