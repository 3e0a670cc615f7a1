"""Who is chosen: documents, padding, token choice and its running threshold.

Shapes: B batch, S sequence, K places, D model, V vocabulary.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from model_cases import (
    balance_predictors,
    bits,
    context_of,
    distinct_tokens,
    lively,
    normal,
    quick,
    random_tokens,
    settle,
    small,
)
from torch import Tensor

from modtrain.models.config import ModelConfig
from modtrain.models.depth import MixtureOfDepths
from modtrain.models.experts_config import ExpertsConfig
from modtrain.models.pattern import num_chosen
from modtrain.models.router_config import RouterConfig
from modtrain.models.selection import expert_choice, quantile, token_choice
from modtrain.models.sequence import SequenceContext
from modtrain.models.transformer import Transformer

TARGETS = ["block", "attention", "mlp", "both"]


def nearest(x: Fraction) -> int:
    """Halves upwards."""
    return math.floor(x + Fraction(1, 2))


def context(
    length: int, documents_BS: Tensor | None = None, valid_BS: Tensor | None = None
) -> SequenceContext:
    return context_of(
        small(), torch.arange(length)[None], documents_BS=documents_BS, valid_BS=valid_BS
    )


def chosen_of(
    scores_BS: Tensor,
    count: int,
    documents_BS: Tensor | None = None,
    valid_BS: Tensor | None = None,
) -> Tensor:
    """Who is chosen (B, S), after a look at the places: each once, the chosen first, in order."""
    index_BK, filled_BK = expert_choice(
        scores_BS, count, context(scores_BS.shape[1], documents_BS, valid_BS)
    )
    assert index_BK.shape == (len(scores_BS), count)
    filled_BK = torch.ones_like(index_BK, dtype=torch.bool) if filled_BK is None else filled_BK
    for places, filled in zip(index_BK.tolist(), filled_BK.tolist(), strict=True):
        assert len(set(places)) == count
        assert filled == sorted(filled, reverse=True)
        assert places[: sum(filled)] == sorted(places[: sum(filled)])
    nobody_BS = torch.zeros_like(scores_BS, dtype=torch.bool)
    return nobody_BS.scatter(1, index_BK, filled_BK)


def expected_of(
    scores: list[float], count: int, documents: list[int], valid: list[bool]
) -> list[bool]:
    """One sequence, from the sentences that say how many each document takes."""
    length, total = len(scores), sum(valid)
    share = max(1, nearest(Fraction(total * count, length))) if total else 0
    chosen = [False] * length
    for document in sorted(set(documents)):
        own = [i for i in range(length) if documents[i] == document]
        before = sum(valid[: own[0]])
        until = sum(valid[: own[-1] + 1])
        quota = 0
        if total:
            quota = nearest(Fraction(until * share, total)) - nearest(
                Fraction(before * share, total)
            )
        ranked = sorted((i for i in own if valid[i]), key=scores.__getitem__, reverse=True)
        assert quota <= len(ranked)
        for i in ranked[:quota]:
            chosen[i] = True
    return chosen


@st.composite
def scored(draw: st.DrawFn) -> tuple[Tensor, int, Tensor]:
    """Scores (B, S), how many to choose, and numbers of documents (B, S) or (1, S)."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    count = draw(st.integers(1, length))
    rows = draw(st.sampled_from([1, batch]))
    starts = st.lists(
        st.lists(st.sampled_from([0, 0, 1, 3]), min_size=length, max_size=length),
        min_size=rows,
        max_size=rows,
    )
    documents_BS = torch.tensor(draw(starts)).cumsum(dim=1)
    return normal(batch, length, seed=draw(st.integers(0, 99))), count, documents_BS


def masked(batch: int, length: int, seed: int, side: str) -> Tensor:
    """Valid tokens in front, at the back, or anywhere."""
    if side == "any":
        return normal(batch, length, seed=seed) > -0.5
    generator = torch.Generator().manual_seed(seed)
    count_B1 = torch.randint(0, length + 1, (batch, 1), generator=generator)
    valid_BS = torch.arange(length) < count_B1
    return valid_BS if side == "right" else valid_BS.flip(1)


# Expert choice among documents and padding.


@quick(100)
@given(scored())
def test_documents_take_their_share_and_the_sequence_its_k(case):
    scores_BS, count, documents_BS = case
    batch, length = scores_BS.shape
    chosen_BS = chosen_of(scores_BS, count, documents_BS)
    assert chosen_BS.sum(dim=1).tolist() == [count] * batch
    documents_BS = documents_BS.expand(batch, length)
    for chosen, documents in zip(chosen_BS, documents_BS, strict=True):
        for document in documents.unique():
            start, *_, last = [*(documents == document).nonzero().flatten().tolist()] * 2
            quota = [nearest(Fraction(edge * count, length)) for edge in (start, last + 1)]
            assert chosen[documents == document].sum() == quota[1] - quota[0]


@quick(80)
@given(scored(), st.integers(0, 99))
def test_a_documents_choice_knows_nothing_of_another_document(case, seed):
    scores_BS, count, documents_BS = case
    own_BS = documents_BS.expand_as(scores_BS)
    changed_B1 = own_BS.gather(1, torch.full((len(own_BS), 1), seed % own_BS.shape[1]))
    is_changed_BS = own_BS == changed_B1
    other_BS = torch.where(is_changed_BS, 3 * normal(*own_BS.shape, seed=seed), scores_BS)
    before_BS, after_BS = (
        chosen_of(scores, count, documents_BS) for scores in (scores_BS, other_BS)
    )
    assert torch.equal(before_BS[~is_changed_BS], after_BS[~is_changed_BS])


@quick(100)
@given(scored(), st.sampled_from(["right", "left", "any"]), st.integers(0, 99), st.booleans())
def test_padding_is_never_chosen_and_a_share_of_the_rest_is(case, side, seed, several):
    scores_BS, count, documents_BS = case
    batch, length = scores_BS.shape
    valid_BS = masked(batch, length, seed, side)
    # What padding scores may be anything.
    scores_BS = torch.where(valid_BS, scores_BS, 10 + scores_BS)
    chosen_BS = chosen_of(scores_BS, count, documents_BS if several else None, valid_BS)
    assert not (chosen_BS & ~valid_BS).any()
    for chosen, valid in zip(chosen_BS, valid_BS, strict=True):
        total = int(valid.sum())
        share = max(1, nearest(Fraction(total * count, length))) if total else 0
        assert chosen.sum() == share


@quick(100)
@given(scored(), st.sampled_from(["none", "right", "left", "any"]), st.integers(0, 99))
def test_expert_choice_takes_the_best_of_each_document(case, side, seed):
    scores_BS, count, documents_BS = case
    batch, length = scores_BS.shape
    valid_BS = None if side == "none" else masked(batch, length, seed, side)
    chosen_BS = chosen_of(scores_BS, count, documents_BS, valid_BS)
    if valid_BS is None:
        valid_BS = torch.ones(1, 1, dtype=torch.bool)
    rows = zip(
        scores_BS,
        documents_BS.expand(batch, length),
        valid_BS.expand(batch, length),
        strict=True,
    )
    expected = [expected_of(s.tolist(), count, d.tolist(), v.tolist()) for s, d, v in rows]
    assert chosen_BS.tolist() == expected


@quick(60)
@given(scored())
def test_one_document_without_padding_is_the_sequence_itself(case):
    scores_BS, count, _ = case
    plain_BS = chosen_of(scores_BS, count)
    for value in (0, 7):
        one_BS = torch.full((1, scores_BS.shape[1]), value)
        assert torch.equal(chosen_of(scores_BS, count, one_BS), plain_BS)
    assert torch.equal(chosen_of(scores_BS, count, None, torch.ones_like(plain_BS)), plain_BS)


# Padding, the whole model.

LENGTHS = (16, 12, 8, 4)
EXPERTS = {
    "dropless": {"count": 4},
    "expert choice": {"count": 4, "choice": "expert"},
    "integrated": {"count": 3, "noop": 1, "balance": "bias"},
}


def model_of(experts: str | None = None, **changes) -> ModelConfig:
    mixture = {} if experts is None else {"experts": ExpertsConfig(**EXPERTS[experts])}
    router = {"predictor_dim": 8, "threshold_decay": 0.5} | changes.pop("router", {})
    config = small(num_layers=2, router=RouterConfig(**router), **mixture, **changes)
    assert not config.problems()
    return config


def settled(config: ModelConfig, seed: int = 0) -> Transformer:
    model = settle(lively(config, seed), 16)
    if "predictor" in config.router.causal_routers:
        balance_predictors(model, random_tokens(4, 16))
    return model


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of several lengths among tokens of no meaning, and which are valid."""
    length = max(map(len, rows))
    tokens_BS = random_tokens(len(rows), length, 77)
    valid_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
    for i, row in enumerate(rows):
        own = slice(len(row)) if side == "right" else slice(length - len(row), None)
        tokens_BS[i, own], valid_BS[i, own] = row, True
    return tokens_BS, valid_BS


def assert_padding_is_nothing(
    config: ModelConfig, side: str, selection: str | None = None, several: bool = False
) -> None:
    """At a quarter of 16, 12, 8 and 4 tokens the numbers chosen agree with the share of 16's."""
    model = settled(config)
    rows = [distinct_tokens(1, length, length)[0] for length in LENGTHS]
    documents = [(torch.arange(len(row)) >= len(row) // 2).long() for row in rows]
    tokens_BS, valid_BS = padded(rows, side)
    documents_BS = None
    if several:
        # Padding belongs to the document beside it.
        documents_BS = torch.full_like(tokens_BS, 1 if side == "right" else 0)
        documents_BS[valid_BS] = torch.cat(documents)
    with torch.no_grad():
        actual = model(tokens_BS, selection=selection, valid_BS=valid_BS, documents_BS=documents_BS)
        alone = [
            model(row[None], selection=selection, documents_BS=own[None] if several else None)
            for row, own in zip(rows, documents, strict=True)
        ]
    for record in actual.routing:
        assert not (record.chosen_BS & ~valid_BS).any()
    for i, expected in enumerate(alone):
        for padded_record, record in zip(actual.routing, expected.routing, strict=True):
            assert torch.equal(padded_record.chosen_BS[i, valid_BS[i]], record.chosen_BS[0])
            scores_S = padded_record.scores_BS[i, valid_BS[i]]
            torch.testing.assert_close(scores_S, record.scores_BS[0], rtol=1e-9, atol=1e-9)
        error = (actual.logits_BSV[i, valid_BS[i]] - expected.logits_BSV[0]).abs().max()
        assert error < 1e-9, f"{len(rows[i])} tokens: off by {error:.1e}"


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("mixer", ["attention", "convolution"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("window", [None, 3])
def test_padding_changes_nothing_among_valid_tokens(target, mixer, several, side, window):
    config = model_of(
        router={"target": target}, mixer=mixer, sliding_window=window, pattern="every"
    )
    assert_padding_is_nothing(config, side, several=several)
    assert_padding_is_nothing(config, side, "predictor", several)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("target", ["block", "mlp"])
@pytest.mark.parametrize("router", [{}, {"choice": "token", "room": 4.0}], ids=["expert", "token"])
def test_padding_changes_nothing_among_experts(router, target, experts, side):
    config = model_of(experts, router={"target": target, **router})
    assert_padding_is_nothing(config, side)
    assert_padding_is_nothing(config, side, config.causal_selections[0])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "router",
    [
        {"score": "mlp", "causal": ["auxiliary", "threshold"]},
        {"score": "oracle_norm", "causal": ["threshold"]},
        {"score": "attention"},
        {"choice": "token", "room": 4.0, "target": "both"},
    ],
    ids=str,
)
def test_padding_changes_nothing_whatever_the_router(router, side):
    config = model_of(router=router)
    for selection in (None, *config.router.causal_routers):
        assert_padding_is_nothing(config, side, selection)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("experts", [None, "dropless"])
def test_padding_has_no_part_in_losses_and_quantiles(experts, side):
    router = {"causal": ["predictor", "auxiliary", "threshold"]}
    config = model_of(experts, router=router, pattern="every")
    model = lively(config)
    row = distinct_tokens(1, 12)
    targets_BS = random_tokens(1, 12, 1)
    tokens_BS, valid_BS = padded([row[0], random_tokens(1, 16)[0]], side)
    tokens_BS, valid_BS = tokens_BS[:1], valid_BS[:1]
    padded_targets_BS = torch.full_like(tokens_BS, -100)
    padded_targets_BS[valid_BS] = targets_BS[0]
    expected = model(row, targets_BS)
    actual = model(tokens_BS, padded_targets_BS, valid_BS=valid_BS)
    assert actual.auxiliary.keys() == expected.auxiliary.keys()
    for name, loss in expected.auxiliary.items():
        torch.testing.assert_close(actual.auxiliary[name], loss, msg=name)
    for one, two in zip(model.observe(actual), model.observe(expected), strict=True):
        torch.testing.assert_close(one, two)
    totals = [sum(found.auxiliary.values(), found.loss) for found in (actual, expected)]
    parameters = dict(model.named_parameters())
    gradients = [torch.autograd.grad(total, list(parameters.values())) for total in totals]
    for name, one, two in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9, msg=name)


# Documents, the whole model.


def two_documents(length: int = 24) -> Tensor:
    return (torch.arange(length) >= length // 2).long()[None]


def document_cases() -> dict[str, tuple[ModelConfig, list[str | None]]]:
    cases = {
        f"{target}, {mixer}, {window}": model_of(
            router={"target": target}, mixer=mixer, sliding_window=window, pattern="every"
        )
        for target in TARGETS
        for mixer in ("attention", "convolution")
        for window in (None, 3)
    }
    cases["attention score"] = model_of(router={"score": "attention"})
    cases["oracle"] = model_of(router={"score": "oracle_norm", "gate": "raw"})
    cases["thresholds"] = model_of(router={"causal": ["auxiliary", "threshold"]})
    cases["token choice"] = model_of(router={"choice": "token", "room": 4.0})
    cases["experts"] = model_of("integrated", router={"target": "mlp"})
    cases["expert choice"] = model_of("expert choice", router={"target": "attention"})
    cases["staged expert choice"] = model_of("expert choice", capacity=0.5)
    return {name: (case, [None, *case.router.causal_routers]) for name, case in cases.items()}


DOCUMENTS = document_cases()


@pytest.mark.parametrize("case", DOCUMENTS)
def test_nothing_passes_between_documents(case):
    config, selections = DOCUMENTS[case]
    model = settled(config)
    tokens_BS, documents_BS = distinct_tokens(2, 24), two_documents()
    for selection in selections:
        for own in (slice(12, None), slice(12)):
            changed_BS = distinct_tokens(2, 24, 9)
            changed_BS[:, own] = tokens_BS[:, own]
            with torch.no_grad():
                before, after = (
                    model(tokens, selection=selection, documents_BS=documents_BS)
                    for tokens in (tokens_BS, changed_BS)
                )
            for one, two in zip(before.routing, after.routing, strict=True):
                assert torch.equal(one.chosen_BS[:, own], two.chosen_BS[:, own])
            moved_BS = (before.logits_BSV - after.logits_BSV).abs().amax(dim=-1)
            assert moved_BS[:, own].max() < 1e-9
            assert moved_BS.max() > 1e-2


@pytest.mark.parametrize("case", DOCUMENTS)
def test_without_documents_the_first_half_does_reach_the_second(case):
    """The positive control: the test above sees what passes."""
    model = settled(DOCUMENTS[case][0])
    tokens_BS = distinct_tokens(2, 24)
    changed_BS = tokens_BS.clone()
    changed_BS[:, :12] = random_tokens(2, 12, 9)
    with torch.no_grad():
        before_BSV, after_BSV = (model(tokens).logits_BSV for tokens in (tokens_BS, changed_BS))
    assert (before_BSV - after_BSV)[:, 12:].abs().max() > 1e-3


@pytest.mark.parametrize("case", DOCUMENTS)
def test_documents_run_as_each_would_by_itself(case):
    """Half of 24 tokens takes 3 of the 6 places: the quotas agree."""
    config, selections = DOCUMENTS[case]
    model = settled(config)
    tokens_BS = distinct_tokens(2, 24)
    for selection in selections:
        with torch.no_grad():
            together_BSV = model(
                tokens_BS, selection=selection, documents_BS=two_documents()
            ).logits_BSV
            alone = [model(half, selection=selection).logits_BSV for half in tokens_BS.split(12, 1)]
        # Angles of later positions are rounded to float32.
        torch.testing.assert_close(together_BSV, torch.cat(alone, dim=1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "experts",
    [
        {"count": 4},
        {"count": 4, "choice": "expert"},
        {"count": 4, "capacity_factor": 0.5},
    ],
    ids=["dropless", "expert choice", "limited"],
)
def test_experts_choose_within_documents_when_judged(experts):
    config = small(pattern="dense", experts=ExpertsConfig(**experts))
    model = settled(config)
    tokens_BS, changed_BS = distinct_tokens(2, 24), distinct_tokens(2, 24, 9)
    changed_BS[:, 12:] = tokens_BS[:, 12:]
    with torch.no_grad():
        before_BSV, after_BSV = (
            model(tokens, selection="causal", documents_BS=two_documents()).logits_BSV
            for tokens in (tokens_BS, changed_BS)
        )
    assert (before_BSV - after_BSV)[:, 12:].abs().max() < 1e-9


# Token choice.


def slow_token_choice(
    scores: list[float], count: int, places: int, threshold: float | None
) -> list[bool]:
    ranked = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    ranked = [i for i in ranked if scores[i] > -math.inf]
    members = ranked[:count]
    if threshold is not None:
        members = [i for i in ranked if scores[i] > threshold][:places]
    return [i in members for i in range(len(scores))]


@quick(80)
@given(st.data(), st.integers(1, 20), st.integers(0, 99), st.booleans())
def test_token_choice_takes_what_is_above_the_threshold_up_to_its_places(data, length, seed, first):
    count = data.draw(st.integers(1, length))
    places = data.draw(st.integers(count, length))
    scores_BS = normal(3, length, seed=seed)
    if data.draw(st.booleans()):
        scores_BS = scores_BS.masked_fill(~masked(3, length, seed, "any"), -math.inf)
    # A score that equals the threshold is not above it.
    threshold = data.draw(st.sampled_from([-3.0, 0.0, 3.0, float(scores_BS[0, 0])]))
    chosen_BS = token_choice(
        scores_BS,
        count,
        places,
        torch.tensor(threshold, dtype=torch.float64),
        torch.tensor(not first),
    )
    known = None if first else threshold
    expected = [slow_token_choice(row, count, places, known) for row in scores_BS.tolist()]
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
def test_a_layer_of_token_choice_equals_the_reference(
    target, mixer, threshold, room, length, several
):
    """The output and every gradient: those above the threshold see one another alone."""
    layer, config = token_layer(target, mixer=mixer, router={"room": room, "gate": "sigmoid"})
    if threshold is not None:
        layer.absorb(torch.tensor(threshold, dtype=torch.float64))
    count = num_chosen(0.25, length)
    places = min(length, math.ceil(room * count))
    x_BSD = normal(3, length, 16, seed=length).requires_grad_()
    documents_S = torch.arange(length) // 5 if several else torch.zeros(length).long()
    found = layer(
        x_BSD,
        context_of(
            config,
            torch.arange(length)[None],
            selection="token",
            documents_BS=documents_S[None] if several else None,
        ),
    )
    record = found.routing[0]
    sequence = reference.Sequence(torch.arange(length), documents_S.tolist())
    p = dict(layer.named_parameters())
    rows = []
    for x_SD, chosen_S in zip(x_BSD, record.chosen_BS, strict=True):
        scores = reference.score(p, "", config, x_SD).tolist()
        expected = slow_token_choice(scores, count, places, threshold)
        assert chosen_S.tolist() == expected
        rows.append(reference.routed_layer(p, "", config, x_SD, sequence, expected, target))
    expected_BSD = torch.stack(rows)
    torch.testing.assert_close(found.value_BSD, expected_BSD, rtol=2e-6, atol=2e-6)
    weight_BSD = normal(3, length, 16, seed=1)
    leaves = {"input": x_BSD} | p
    gradients = [
        torch.autograd.grad(
            (out_BSD * weight_BSD).sum(), list(leaves.values()), materialize_grads=True
        )
        for out_BSD in (found.value_BSD, expected_BSD)
    ]
    for name, one, two in zip(leaves, *gradients, strict=True):
        torch.testing.assert_close(
            one, two, rtol=2e-6, atol=2e-6 * float(two.abs().max() + 1), msg=name
        )


@pytest.mark.parametrize("threshold", [None, -9.0, 0.0, 9.0])
def test_token_choice_computes_the_same_number_of_places_whoever_is_chosen(threshold):
    layer, config = token_layer()
    if threshold is not None:
        layer.absorb(torch.tensor(threshold, dtype=torch.float64))
    shapes = []
    layer.module.register_forward_pre_hook(lambda _module, found: shapes.append(found[0].shape))
    layer(normal(3, 24, 16), context_of(config, torch.arange(24)[None], selection="token"))
    assert shapes == [(3, 8, 16)], "a quarter of 24, and a quarter more"


# The running threshold.


@quick(80)
@given(st.data(), st.integers(1, 3), st.integers(1, 20), st.integers(0, 99))
def test_the_quantile_is_the_middle_between_the_last_above_and_the_first_below(
    data, batch, length, seed
):
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
    st.lists(st.floats(-50, 50), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.3, 0.9, 0.99]),
)
def test_the_threshold_is_a_mean_of_the_past_without_a_pull_to_zero(values, decay):
    layer, _ = token_layer(router={"threshold_decay": decay})
    assert layer.threshold() == 0
    for value in values:
        layer.absorb(torch.tensor(value, dtype=torch.float64))
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    np.testing.assert_allclose(float(layer.threshold()), mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("experts", [None, "expert choice", "integrated"])
def test_each_running_state_learns_from_its_own_record(experts):
    router = {"choice": "token", "target": "both"}
    model = lively(model_of(experts, router=router, pattern="every"))
    output = model(random_tokens(2, 16))
    before = [bits(buffer).clone() for buffer in model.buffers()]
    observed = model.observe(output)
    assert len(observed) == 4 + (0 if experts is None else 2)
    assert all(torch.equal(bits(b), one) for b, one in zip(model.buffers(), before, strict=True))
    model.absorb(observed)
    for router, record in zip(model.routers, output.routing, strict=True):
        torch.testing.assert_close(router.threshold(), record.quantile)
    for mixture, record in zip(model.mixtures, output.experts, strict=True):
        if experts == "expert choice":
            mean_E = mixture.quantile_sum / mixture.quantile_weight
            torch.testing.assert_close(mean_E, record.quantile_E)
        else:
            assert torch.equal(mixture.bias.sign(), (record.load_E.mean() - record.load_E).sign())


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
                observed = layer.observe(record)
        if step == 10:
            old = layer.threshold()
        shares["old"].append(float((record.scores_BS > old).double().mean()))
        layer.absorb(observed)
    off = {name: abs(sum(found[10:]) / 50 - capacity) for name, found in shares.items()}
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


# Fact 3 on every path: the others' bits.


@quick(80)
@given(
    st.sampled_from(TARGETS),
    st.sampled_from(["linear", "mlp", "random", "fixed", "oracle_norm", "attention"]),
    st.sampled_from(["expert", "token", "auxiliary", "predictor", "threshold"]),
    st.sampled_from(["none", "right", "left"]),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from([None, "dropless", "expert choice", "integrated"]),
    st.integers(0, 99),
)
@example("block", "linear", "token", "none", False, torch.float32, None, 0)
@example("block", "linear", "predictor", "left", True, torch.bfloat16, "dropless", 0)
def test_skipped_tokens_keep_their_bits_on_every_path(
    target, score, decision, side, several, dtype, experts, seed
):
    learns = score not in ("random", "fixed")
    router = {"target": target, "score": score}
    if decision == "token":
        router["choice"] = "token"
    elif decision != "expert" and learns:
        router["causal"] = [decision]
    mixture = {} if experts is None else {"experts": ExpertsConfig(**EXPERTS[experts])}
    config = small(
        num_layers=1, pattern=[0.25], router=RouterConfig(**router, predictor_dim=8), **mixture
    )
    assume(not config.router.problems("router"))
    selection = {"expert": "top_k"}.get(decision, decision) if learns else "causal"
    valid_BS = None if side == "none" else masked(3, 20, seed, side)
    at = context_of(
        config,
        torch.arange(20)[None],
        selection=selection,
        valid_BS=valid_BS,
        documents_BS=torch.arange(20)[None] // 7 if several else None,
    )
    x_BSD = normal(3, 20, 16, seed=seed, dtype=dtype)
    x_BSD[:, ::2, 0] = -0.0
    x_BSD[:, 1::2, 0] = 0.0
    x_BSD[:, :, 1] = 1e-30
    for router in lively(config, seed, dtype).routers:
        if router.keeps_state:
            # The size of an update is never negative.
            router.absorb(torch.tensor(4.0 if score == "oracle_norm" else 0.2))
        out_BSD, (record,), *_ = router(x_BSD, at, None, normal(3, 20, seed=seed))
        skipped_BS = ~record.chosen_BS
        assert torch.equal(bits(out_BSD[skipped_BS]), bits(x_BSD[skipped_BS]))


def test_a_layer_that_nobody_enters_still_says_what_its_experts_did():
    """Records go by their place: without one, a later layer's would be taken for it."""
    model = lively(model_of("dropless", pattern="every"))
    with torch.no_grad():
        model.routers[0].predictor.out.bias.fill_(-1e3)
        output = model(random_tokens(2, 16), selection="predictor")
    assert not output.routing[0].chosen_BS.any()
    assert len(output.experts) == len(model.mixtures)
    assert output.experts[0].executed_E.sum() == 0
