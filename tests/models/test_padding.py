"""Padding and documents pass through a whole model as if they were not there.

Shapes: B batch, S sequence, K places, D model, V vocabulary.
"""

import pytest
import torch
from torch import Tensor

from modtrain.models.config import ModelConfig
from modtrain.models.experts.config import ExpertsConfig
from tests.helpers.model_cases import distinct_tokens, lively, random_tokens, small
from tests.helpers.thresholds import require_margin
from tests.models.depth.choice_cases import (
    EXPERTS,
    LENGTHS,
    TARGETS,
    model_of,
    settled,
    two_documents,
)


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
        if side == "right":
            # Causal attention needs no mask there.
            unmasked = model(
                tokens_BS,
                selection=selection,
                valid_BS=valid_BS,
                is_right_padded=True,
                documents_BS=documents_BS,
            )
            for one, two in zip(unmasked.routing, actual.routing, strict=True):
                assert torch.equal(one.chosen_BS, two.chosen_BS)
            error = (unmasked.logits_BSV - actual.logits_BSV)[valid_BS].abs().max()
            assert error < 1e-9, f"off by {error:.1e} without a mask"
    for record in actual.routing:
        assert not (record.chosen_BS & ~valid_BS).any()
    for i, expected in enumerate(alone):
        require_margin(model, expected, selection or config.training_selection)
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
@pytest.mark.parametrize(
    "router", [{}, {"choice": "token", "capacity_factor": 4.0}], ids=["expert", "token"]
)
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
        {"choice": "token", "capacity_factor": 4.0, "target": "both"},
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
    actual = model(tokens_BS, padded_targets_BS, valid_BS=valid_BS, is_right_padded=side == "right")
    assert actual.auxiliary.keys() == expected.auxiliary.keys()
    for name, loss in expected.auxiliary.items():
        torch.testing.assert_close(actual.auxiliary[name], loss, msg=name)
    for one, two in zip(model.batch_stats(actual), model.batch_stats(expected), strict=True):
        torch.testing.assert_close(one, two)
    totals = [sum(output.auxiliary.values(), output.loss) for output in (actual, expected)]
    parameters = dict(model.named_parameters())
    gradients = [torch.autograd.grad(total, list(parameters.values())) for total in totals]
    for name, one, two in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9, msg=name)


# Documents, the whole model.


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
    cases["token choice"] = model_of(router={"choice": "token", "capacity_factor": 4.0})
    cases["experts"] = model_of("integrated", router={"target": "mlp"})
    cases["expert choice"] = model_of("expert choice", router={"target": "attention"})
    cases["staged expert choice"] = model_of("expert choice", capacity=0.5)
    with_decisions = {
        name: (case, [None, *case.router.causal_routers]) for name, case in cases.items()
    }
    # Experts choose among the tokens of a document when they are judged.
    for changes in ({}, {"choice": "expert"}, {"capacity_factor": 0.5}):
        config = small(pattern="dense", experts=ExpertsConfig(count=4, **changes))
        with_decisions[f"judged, {changes}"] = config, ["causal"]
    return with_decisions


DOCUMENTS = document_cases()


@pytest.mark.parametrize("case", DOCUMENTS)
def test_documents_run_as_each_would_by_itself(case):
    """Half of 24 tokens takes 3 of the 6 places: the quotas agree."""
    config, selections = DOCUMENTS[case]
    model = settled(config)
    tokens_BS = distinct_tokens(2, 24)
    for selection in selections:
        with torch.no_grad():
            packed = model(tokens_BS, selection=selection, documents_BS=two_documents())
            # Angles of later positions are rounded to float32.
            require_margin(model, packed, selection or config.training_selection, least=1e-5)
            alone = [model(half, selection=selection).logits_BSV for half in tokens_BS.split(12, 1)]
        torch.testing.assert_close(packed.logits_BSV, torch.cat(alone, dim=1), rtol=0, atol=1e-4)
