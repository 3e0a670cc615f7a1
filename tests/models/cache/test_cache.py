"""Tokens run through a cache, in whatever pieces, come to what they come to all at once."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modtrain.models import attention
from modtrain.models.cache.cache import Cache
from modtrain.models.cache.ragged_store import RaggedStore
from modtrain.models.depth import selection as token_selection
from modtrain.models.depth.config import ComputeBudget, RouterConfig
from modtrain.models.depth.selection import apply_cumulative_cap
from modtrain.models.experts.config import ExpertsConfig
from tests.helpers.model_cases import VOCAB, quick, random_tokens, small
from tests.helpers.thresholds import require_margin
from tests.models.cache.cache_cases import (
    EXPERTS,
    alone,
    assert_each_alone,
    budgets,
    cached_configs,
    cases,
    padded,
    ready,
    run_of,
    runs,
    tracks_routed,
)


@quick(60)
@given(cases(), st.sampled_from([None, 3]), st.data())
def test_pieces_equal_the_whole(case, eos, data):
    config, batch, length, parts, seed = case
    model = ready(config, 24, seed)
    tokens = random_tokens(batch, length, seed)
    documents = None if eos is None else (tokens == eos).long().cumsum(1)
    selection = data.draw(st.sampled_from(config.causal_selections))
    routers = len(model.routers)
    budget = data.draw(
        st.sampled_from([
            None,
            ComputeBudget(layer_cap=0.3),
            ComputeBudget(step_cap=1),
            ComputeBudget(tuple(0.2 for _ in range(routers)), 0.5, 2),
        ])
    )  # fmt: skip
    whole = model(tokens, selection=selection, documents_BS=documents, budget=budget)
    require_margin(model, whole, selection, budget)
    cache = Cache(config, batch, tracks_routed=budget is not None and budget.layer_cap is not None)
    logits, chosen, start = [], [], 0
    for part in parts:
        piece = slice(start, start + part)
        output = model.extend(
            tokens[:, piece],
            cache,
            selection,
            budget=budget,
            documents_NS=None if documents is None else documents[:, piece],
        )
        logits.append(output.logits_BSV)
        chosen.append([record.chosen_BS for record in output.routing])
        start += part
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits_BSV, atol=1e-9, rtol=1e-9)
    for record, *own in zip(whole.routing, *chosen, strict=True):
        assert torch.equal(torch.cat(own, 1), record.chosen_BS)


# Ragged: padding anywhere, subsets of the rows, none of some, detours that are taken back.


@quick(50)
@given(runs())
def test_each_sequence_equals_itself_alone(run):
    assert_each_alone(run)


@quick(15)
@given(runs(dtype=torch.float32))
def test_each_sequence_equals_itself_alone_in_float32(run):
    assert_each_alone(run, 1e-5)


@pytest.mark.parametrize("changes", [{"pattern": "dense"}, {"capacity": 0.5}])
def test_all_rows_come_in_any_order(changes):
    run = run_of(ready(small(num_layers=2, **changes), 24), 9, 7)
    run.step(3, 3, rows=[1, 0])
    run.step(1, 1)
    run.step(1, 3, rows=[1, 0])
    run.step(2, 2, rows=[1, 0])
    assert_each_alone(run)


@quick(15)
@given(cached_configs(), st.data())
def test_what_padding_holds_changes_nothing(config, data):
    model = ready(config, 24)
    batch, budget = 3, data.draw(budgets(config))
    valids = [
        padded(data.draw, data.draw(st.lists(st.integers(0, 6), min_size=batch, max_size=batch)))
        for _ in range(3)
    ]
    own = [random_tokens(*valid_NS.shape, 10 + i) for i, valid_NS in enumerate(valids)]

    def run_with(fill: int):
        torch.manual_seed(0)
        cache, tensors = Cache(config, batch, tracks_routed=tracks_routed(budget)), []
        for tokens_NS, valid_NS in zip(own, valids, strict=True):
            filler_NS = random_tokens(*tokens_NS.shape, fill)
            output = model.extend(
                tokens_NS.where(valid_NS, filler_NS),
                cache,
                budget=budget,
                valid_NS=valid_NS,
                documents_NS=torch.ones_like(tokens_NS).where(valid_NS, filler_NS),
            )
            tensors += [output.logits_BSV[valid_NS], *(r.chosen_BS for r in output.routing)]
        return [*tensors, [list(store.lengths) for store in cache.layers]]

    for x, y in zip(run_with(0), run_with(1), strict=True):
        assert x == y if isinstance(x, list) else torch.equal(x, y)


@quick(20)
@given(cached_configs(), st.booleans(), st.data())
def test_last_only_is_the_last_of_all(config, is_ragged, data):
    model, budget = ready(config, 24), data.draw(budgets(config))
    tokens_NS = random_tokens(3, 9)
    counts = data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=3))
    valid_NS = padded(data.draw, [*counts, 1][:3])[:, :9] if is_ragged else None
    if valid_NS is not None:
        tokens_NS = tokens_NS[:, : valid_NS.shape[1]]
        valid_NS[:, -1] |= ~valid_NS.any(1)
    caches = [Cache(config, 3, tracks_routed=tracks_routed(budget)) for _ in range(2)]
    for _ in range(2):
        every, last = (
            model.extend(tokens_NS, cache, budget=budget, valid_NS=valid_NS, last_only=only)
            for cache, only in zip(caches, (False, True), strict=True)
        )
        place_N = torch.full((3,), tokens_NS.shape[1] - 1)
        if valid_NS is not None:
            place_N = (valid_NS * torch.arange(1, 1 + valid_NS.shape[1])).argmax(1)
        expected_N1V = every.logits_BSV[torch.arange(3), place_N][:, None]
        torch.testing.assert_close(last.logits_BSV, expected_N1V, atol=1e-12, rtol=1e-9)
        for actual, record in zip(last.routing, every.routing, strict=True):
            assert torch.equal(actual.chosen_BS, record.chosen_BS)


# No decision depends on later tokens, nor on other sequences.


def moved(model, budget, row: int, place: int) -> Tensor:
    """How far the logits (N, L) move when token ``place`` of sequence ``row`` changes."""
    logits = []
    for change in (0, 1):
        run = run_of(model, 12, 12, 12, budget=budget)
        run.texts[row][place] = (run.texts[row][place] + change) % VOCAB
        for counts in ((3, 5, 4), (6, 4, 5), (3, 3, 3)):
            run.step(*counts)
        for report in run.reports:
            require_margin(model, report, **run.settings)
        logits.append(torch.stack([torch.cat(output.logits) for output in run.outputs]))
    return (logits[0] - logits[1]).abs().amax(-1)


@quick(25)
@given(cached_configs(), st.integers(0, 2), st.integers(0, 11), st.data())
def test_no_token_knows_of_later_ones_nor_of_other_sequences(config, row, place, data):
    moved_NL = moved(ready(config, 24), data.draw(budgets(config)), row, place)
    assert (moved_NL[row, :place] < 1e-9).all()
    moved_NL[row] = 0
    assert (moved_NL < 1e-9).all()


def test_what_would_look_ahead_or_aside_is_found_out(monkeypatch):
    """Positive control of the test above."""
    model = ready(small(num_layers=2, pattern="dense"), 24)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_cache_mask", lambda *_: None)
        assert moved(model, None, 1, 8)[1, 5:8].min() > 1e-3
    fields = RaggedStore.fields
    with monkeypatch.context() as patch:
        rolled = lambda store, rows: tuple(x.roll(1, 0) for x in fields(store, rows))  # noqa: E731
        patch.setattr(RaggedStore, "fields", rolled)
        assert moved(model, None, 1, 8)[2].max() > 1e-3
    model = ready(small(num_layers=2, pattern="every", capacity=0.5), 24)
    with monkeypatch.context() as patch:
        # A cap that keeps the last one that wants it.
        last = lambda wanted, *_: wanted & (wanted.flip(1).cumsum(1).flip(1) <= 1)  # noqa: E731
        patch.setattr(token_selection, "apply_cumulative_cap", last)
        budget = ComputeBudget(layer_cap=0.4)
        assert any(moved(model, budget, 1, t)[1, :t].max() > 1e-3 for t in range(6, 12))


def test_a_model_of_bfloat16_by_autocast_stays_near_float32():
    for changes in (
        {"router": RouterConfig(score="fixed"), "qk_norm": True},
        {"router": RouterConfig(score="random", target="both"), "sliding_window": 4},
        {"router": RouterConfig(score="fixed"), "mixer": "convolution"},
        {"router": RouterConfig(score="fixed"), "experts": EXPERTS["shared"]},
    ):
        config = small(capacity=0.5, **changes)
        model = ready(config, 24, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        run = run_of(model, 12, 10)
        with torch.autocast("cpu", torch.bfloat16):
            for counts in ((5, 3), (1, 1), (4, 6), (2, 0)):
                run.step(*counts)
        for text, output in zip(run.texts, run.outputs, strict=True):
            whole_LV = alone(model, text, "causal").logits_BSV[0]
            error = (torch.cat(output.logits).float() - whole_LV).abs().max() / whole_LV.abs().max()
            assert 1e-5 < error < 0.05


# Dials.


def slow_cumulative_cap(wanted: list[bool], allowed: list[int], taken: int) -> list[bool]:
    chosen = []
    for wants, limit in zip(wanted, allowed, strict=True):
        chosen.append(wants and taken < limit)
        taken += chosen[-1]
    return chosen


@quick(200)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), min_size=1, max_size=12), st.data())
def test_a_cumulative_cap_takes_the_earlier_ones(steps, data):
    wanted = [wants for wants, _ in steps]
    first = data.draw(st.integers(0, 4))
    allowed = [first + sum(rise for _, rise in steps[: i + 1]) for i in range(len(steps))]
    taken = data.draw(st.integers(0, first))
    actual = apply_cumulative_cap(
        torch.tensor([wanted]), torch.tensor([allowed]), torch.tensor([[taken]])
    )
    assert actual[0].tolist() == slow_cumulative_cap(wanted, allowed, taken)
    actual = apply_cumulative_cap(torch.tensor([wanted]), torch.tensor([allowed]), taken)
    assert actual[0].tolist() == slow_cumulative_cap(wanted, allowed, taken)


@quick(25)
@given(
    st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 0.7, 1.0]),
    st.sampled_from(["block", "attention", "mlp", "both"]),
    st.sampled_from(["linear", "fixed", "random"]),
    st.data(),
)
def test_caps_are_hard_at_every_token(cap, target, score, data):
    """Of the chosen tokens, the earliest that the cap allows."""
    config = small(num_layers=2, router=RouterConfig(target=target, score=score), pattern="every")
    model = ready(config, 24)
    free = not config.router.needs_causal
    eager = ComputeBudget(tuple(0.8 if free else -0.5 for _ in model.routers), layer_cap=cap)
    run = run_of(model, 20, 15, budget=eager, margin=3)
    run.finish(data.draw, 3)
    fraction = Fraction(cap).limit_denominator(1000)
    for text, output in zip(run.texts, run.outputs, strict=True):
        allowed = [fraction * (i + 1) // 1 for i in range(len(text))]
        taking = output.taking()
        whole = alone(model, text, **run.settings)
        require_margin(model, whole, **run.settings)
        for record, own in zip(whole.routing, taking.tolist(), strict=True):
            assert own == record.chosen_BS[0].tolist()
        # The first router's wishes do not depend on its cap.
        free_budget = eager._replace(layer_cap=None)
        wanted = (
            alone(model, text, run.settings["selection"], budget=free_budget).routing[0].chosen_BS
        )
        assert taking[0].tolist() == slow_cumulative_cap(wanted[0].tolist(), allowed, 0)
        for own in taking:
            assert all(n <= limit for n, limit in zip(own.cumsum(0).tolist(), allowed, strict=True))
    for number, store in enumerate(run.cache.routed):
        for row, output in enumerate(run.outputs):
            expected = output.taking()[number].nonzero()[:, 0]
            assert torch.equal(store.positions([row])[0, : store.lengths[row]], expected)


@pytest.mark.parametrize("target", ["block", "attention", "mlp", "both"])
@pytest.mark.parametrize("step_cap", [0, 1, 2, 3])
def test_a_step_cap_counts_parts(target, step_cap):
    config = small(num_layers=3, pattern="every", router=RouterConfig(target=target))
    model = ready(config, 24)
    routers = len(model.routers)
    run = run_of(model, 9, 9, budget=ComputeBudget((-99.0,) * routers, step_cap=step_cap))
    for counts in ((4, 2), (1, 1), (4, 6)):
        run.step(*counts)
    for output in run.outputs:
        expected = torch.arange(routers)[:, None].expand(-1, 9) < step_cap
        assert torch.equal(output.taking(), expected)


@pytest.mark.parametrize("target", ["block", "attention", "mlp", "both"])
@pytest.mark.parametrize("score", ["linear", "random", "fixed"])
def test_levels_move_each_router_by_its_own_number(target, score):
    config = small(pattern="every", router=RouterConfig(target=target, score=score))
    model = ready(config, 24)
    routers = len(model.routers)
    yes, no = (1.0, 0.0) if score != "linear" else (-99.0, 99.0)
    for number in range(routers):
        thresholds = tuple(yes if i == number else no for i in range(routers))
        run = run_of(model, 7, budget=ComputeBudget(thresholds))
        for count in (4, 3):
            run.step(count)
        expected = torch.arange(routers)[:, None].expand(-1, 7) == number
        assert torch.equal(run.outputs[0].taking(), expected)


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.5, 0.8])
def test_routers_without_content_take_the_budgets_share(share):
    for score in ("fixed", "random"):
        config = small(num_layers=2, pattern="every", router=RouterConfig(score=score))
        run = run_of(ready(config, 24), 600, budget=ComputeBudget((share, 0.4)))
        for count in (1, 599):
            run.step(count)
        taking = run.outputs[0].taking().float().mean(1)
        wanted = torch.tensor([share, 0.4])
        assert (taking - wanted).abs().max() < (2e-3 if score == "fixed" else 0.06)


def test_a_cap_that_the_cache_does_not_count_for_is_refused():
    config = small()
    with pytest.raises(ValueError, match="tracks_routed"):
        ready(config, 24).extend(
            random_tokens(1, 3), Cache(config, 1), budget=ComputeBudget(layer_cap=0.5)
        )


@pytest.mark.parametrize("before", [None, 1.0])
def test_a_cap_set_later_counts_what_took_part_before(before):
    config = small(num_layers=2)
    model, every = ready(config, 24), (-99.0,)
    cache = Cache(config, 1, tracks_routed=True)
    tokens = random_tokens(1, 20)
    model.extend(tokens[:, :6], cache, budget=ComputeBudget(every, before))
    later = (
        model.extend(tokens[:, 6:], cache, budget=ComputeBudget(every, 0.5)).routing[0].chosen_BS[0]
    )
    # Six were routed; from the fourteenth token on the cap allows every second one.
    assert later.nonzero()[:, 0].tolist() == [7, 9, 11, 13]


@pytest.mark.parametrize("gate", ["raw", "sigmoid"])
def test_a_gate_on_fixed_scores_is_alike_in_pieces(gate):
    config = small(num_layers=2, capacity=0.3, router=RouterConfig(score="fixed", gate=gate))
    run = run_of(ready(config, 24), 12)
    for count in (5, 5, 2):
        run.step(count)
    assert_each_alone(run)


# Errors.


def test_what_does_not_fit_is_refused():
    config = small()
    model, tokens = ready(config, 24), random_tokens(2, 3)
    for selection in ("top_k", "token", "threshold", "auxiliary", "causal", "nonsense"):
        with pytest.raises(ValueError, match=f"no causal decision {selection}.*predictor"):
            model.extend(tokens, Cache(config, 2), selection)
    for rows in ([0], [0, 1, 1], [1, 1]):
        with pytest.raises(ValueError, match="2 sequences of tokens for the rows"):
            model.extend(tokens, Cache(config, 2), rows=rows)
    for rows in ([0, -2], [-1, 0], [0, 2]):
        with pytest.raises(ValueError, match="rows"):
            model.extend(tokens, Cache(config, 2), rows=rows)
    with pytest.raises(ValueError, match="2 sequences of tokens for the rows"):
        model.extend(tokens, Cache(config, 3))
    config = small(router=RouterConfig(causal=[]))
    with pytest.raises(ValueError, match="trained with none"):
        ready(config, 24).extend(tokens, Cache(config, 2))
    dense = small(pattern="dense")
    with pytest.raises(ValueError, match="trained with causal"):
        ready(dense, 24).extend(tokens, Cache(dense, 2), "predictor")


@pytest.mark.parametrize(
    "router", [{"causal": ["threshold"]}, {"choice": "token"}, {"gate": "raw"}, {"gate": "sigmoid"}]
)
def test_scores_of_the_whole_sequence_are_refused(router):
    config = small(router=RouterConfig(score="oracle_norm", **router))
    assert not config.problems()
    with pytest.raises(ValueError, match="whole sequence"):
        ready(config, 24).extend(random_tokens(2, 3), Cache(config, 2))
    # Where no layer asks for them they are no error.
    config.pattern = "dense"
    ready(config, 24).extend(random_tokens(2, 3), Cache(config, 2))


def test_thresholds_are_one_per_router():
    model, tokens = ready(small(), 24), random_tokens(1, 3)
    for thresholds in ((0.0,), (0.0, 0.0, 0.0)):
        with pytest.raises(ValueError, match="thresholds for 2 routers"):
            model(tokens, selection="predictor", budget=ComputeBudget(thresholds))
        with pytest.raises(ValueError, match="thresholds for 2 routers"):
            model.extend(tokens, Cache(model.config, 1), budget=ComputeBudget(thresholds))


def test_single_tokens_beside_padding_enter_experts():
    config = small(pattern="every", experts=ExpertsConfig(count=2, dim=8))
    model, budget = ready(config, 24), ComputeBudget(thresholds=(-math.inf,) * config.num_layers)
    tokens_NS, valid_NS = random_tokens(3, 1), torch.tensor([[True], [False], [True]])
    output = model.extend(tokens_NS, Cache(config, 3), budget=budget, valid_NS=valid_NS)
    alone = model.extend(tokens_NS[2:], Cache(config, 1), budget=budget)
    torch.testing.assert_close(output.logits_BSV[2:], alone.logits_BSV)
