"""Who is chosen among documents and padding, and what stays of the others.

Shapes: B batch, S sequence, K places, D model, V vocabulary.
"""

from fractions import Fraction

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from modtrain.models.depth.config import RouterConfig
from modtrain.models.depth.selection import expert_choice
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.transformer import Transformer
from tests.helpers.model_cases import (
    bits,
    configs,
    context_of,
    lively,
    normal,
    quick,
    random_tokens,
    small,
)
from tests.models.depth.choice_cases import EXPERTS, TARGETS, context, masked, model_of, nearest


def chosen_of(
    scores_BS: Tensor,
    count: int,
    documents_BS: Tensor | None = None,
    valid_BS: Tensor | None = None,
) -> Tensor:
    """Who is chosen (B, S), after a look at the places: each once, the chosen first, in order."""
    index_BK, slot_mask_BK, *_ = expert_choice(
        scores_BS, count, context(scores_BS.shape[1], documents_BS, valid_BS)
    )
    assert index_BK.shape == (len(scores_BS), count)
    slot_mask_BK = (
        torch.ones_like(index_BK, dtype=torch.bool) if slot_mask_BK is None else slot_mask_BK
    )
    for num_slots, filled in zip(index_BK.tolist(), slot_mask_BK.tolist(), strict=True):
        assert len(set(num_slots)) == count
        assert filled == sorted(filled, reverse=True)
        assert num_slots[: sum(filled)] == sorted(num_slots[: sum(filled)])
    padding_BS = torch.zeros_like(scores_BS, dtype=torch.bool)
    return padding_BS.scatter(1, index_BK, slot_mask_BK)


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


# Expert choice among documents and padding.


@quick(150)
@given(
    scored(), st.sampled_from(["none", "right", "left", "any"]), st.integers(0, 99), st.booleans()
)
def test_expert_choice_takes_the_best_of_each_document(case, side, seed, several):
    """Each document's share, whatever the others score, and never padding."""
    scores_BS, count, documents_BS = case
    batch, length = scores_BS.shape
    valid_BS = None if side == "none" else masked(batch, length, seed, side)
    if valid_BS is not None:
        # What padding scores may be anything.
        scores_BS = torch.where(valid_BS, scores_BS, 10 + scores_BS)
    chosen_BS = chosen_of(scores_BS, count, documents_BS if several else None, valid_BS)
    if not several:
        documents_BS = torch.zeros_like(documents_BS)
    if valid_BS is None:
        valid_BS = torch.ones(1, 1, dtype=torch.bool)
    rows = zip(
        scores_BS, documents_BS.expand(batch, length), valid_BS.expand(batch, length), strict=True
    )
    expected = [expected_of(s.tolist(), count, d.tolist(), v.tolist()) for s, d, v in rows]
    assert chosen_BS.tolist() == expected


@quick(60)
@given(configs(), st.integers(1, 40), st.integers(1, 3), st.booleans())
def test_exactly_k_tokens_take_part(config, seq_len, batch, tied):
    tokens_BS = random_tokens(batch, seq_len)
    if tied:  # one token throughout: in the first layer all the scores are equal
        tokens_BS = torch.zeros_like(tokens_BS)
    routing = Transformer(config)(tokens_BS).routing
    shares = [config.capacities[layer] for layer, _ in config.routed_parts]
    assert len(routing) == len(shares)
    for record, share in zip(routing, shares, strict=True):
        expected = max(1, round(share * seq_len))
        assert record.chosen_BS.sum(dim=1).tolist() == [expected] * batch


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)])
def test_scores_are_kept_wider_than_bfloat16_which_would_make_them_tie(dtype, autocast):
    layer = lively(small(), dtype=dtype).routers[0]
    x_BSD = normal(2, 200, 16, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        _, (record,), *_ = layer(x_BSD, context_of(small(), torch.arange(200)[None]))
    exact_BS = x_BSD.double() @ layer.router.weight.double()
    torch.testing.assert_close(record.scores_BS.double(), exact_BS, rtol=1e-5, atol=1e-5)
    assert record.scores_BS.dtype == torch.float32
    assert len(record.scores_BS.unique()) == record.scores_BS.numel()


# Fact 3 on every path: the others' bits.


@quick(80)
@given(
    st.sampled_from(TARGETS),
    st.sampled_from(["linear", "mlp", "random", "fixed", "oracle_norm", "attention"]),
    st.sampled_from(["expert", "token", "auxiliary", "predictor", "threshold"]),
    st.sampled_from(["none", "right", "left"]),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, "autocast"]),
    st.sampled_from([None, "dropless", "expert choice", "integrated"]),
    st.integers(0, 99),
)
@example("block", "linear", "token", "none", False, torch.float32, None, 0)
@example("block", "linear", "predictor", "left", True, torch.bfloat16, "dropless", 0)
@example("block", "linear", "expert", "none", False, "autocast", None, 0)
@example("block", "linear", "predictor", "none", False, "autocast", None, 0)
def test_skipped_tokens_keep_bits(target, score, decision, side, several, dtype, experts, seed):
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
    is_cast = dtype == "autocast"
    dtype = torch.float32 if is_cast else dtype
    # Signed zeros and tiny numbers would show an addition of zero or a round trip in precision.
    x_BSD = normal(3, 20, 16, seed=seed, dtype=dtype)
    x_BSD[:, ::2, 0] = -0.0
    x_BSD[:, 1::2, 0] = 0.0
    x_BSD[:, :, 1] = 1e-30
    for router in lively(config, seed, dtype).routers:
        if router.has_running_stats:
            # The size of an update is never negative.
            router.update_running_stats(torch.tensor(4.0 if score == "oracle_norm" else 0.2))
        at = at._replace(received_BS=normal(3, 20, seed=seed))
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            out_BSD, (record,), *_ = router(x_BSD, at)
        skipped_BS = ~record.chosen_BS
        assert out_BSD.dtype == x_BSD.dtype
        assert torch.equal(bits(out_BSD[skipped_BS]), bits(x_BSD[skipped_BS]))


def test_a_layer_without_tokens_still_reports_its_experts():
    """Records go by their place: without one, a later layer's would be taken for it."""
    model = lively(model_of("dropless", pattern="every"))
    with torch.no_grad():
        model.routers[0].predictor.out.bias.fill_(-1e3)
        output = model(random_tokens(2, 16), selection="predictor")
    assert not output.routing[0].chosen_BS.any()
    assert len(output.experts) == len(model.mixtures)
    assert output.experts[0].executed_E.sum() == 0
