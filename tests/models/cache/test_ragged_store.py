"""What a cache keeps: what took part and is still looked at, in little memory, and can be undone.

Shapes: B sequences, N of them in a call, K new tokens, L entries.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modtrain.models.cache.cache import Cache, CacheView
from modtrain.models.cache.ragged_store import RaggedStore
from modtrain.models.depth.config import ComputeBudget
from tests.helpers.model_cases import normal, quick, random_tokens, small
from tests.models.cache.cache_cases import (
    Run,
    SlowStore,
    TokenOutputs,
    append,
    assert_each_alone,
    budgets,
    cached_configs,
    kept,
    padded,
    ragged,
    ready,
    run_of,
    runs,
    tracks_routed,
)

# What is computed and kept is what took part, and no more.


def expected_positions(run: Run, layer: int, row: int) -> Tensor:
    """Positions that the mixer of ``layer`` saw of sequence ``row``."""
    config = run.model.config
    parts = [part for at, part in config.routed_parts if at == layer]
    positions = torch.arange(run.cache.seen[row])
    if not parts or parts == ["mlp"]:
        return positions
    number = config.routed_parts.index((layer, parts[0]))
    return positions[run.outputs[row].taking()[number]]


@quick(25)
@given(runs())
def test_a_store_holds_the_tokens_that_took_part(run):
    for layer, store in enumerate(run.cache.layers):
        for row, length in enumerate(store.lengths):
            expected = expected_positions(run, layer, row)
            needed = len(expected)
            if store.last is not None:
                needed = min(needed, store.last)
            elif store.window is not None:
                needed = int((expected > run.cache.seen[row] - store.window).sum())
            if store.window is None and store.last is None:
                assert length == len(expected)
            assert needed <= length <= len(expected)
            positions_1L = store.positions([row])
            assert length == positions_1L.shape[1] or not length
            kept = expected[len(expected) - length :]
            assert torch.equal(positions_1L[0, :length], kept)
            if run.documents is not None:
                assert torch.equal(store.documents([row])[0, :length], run.documents[row][kept])


@quick(25)
@given(cached_configs(), st.data())
def test_only_routed_tokens_are_run(config, data):
    model, budget = ready(config, 24), data.draw(budgets(config))
    calls = []
    for number, router in enumerate(model.routers):
        router.module.register_forward_pre_hook(
            lambda _, args, number=number: calls.append((number, *args[0].shape[:2]))
        )
    cache = Cache(config, 4, tracks_routed=tracks_routed(budget))
    for seed in range(4):
        counts = data.draw(st.lists(st.integers(0, 3), min_size=4, max_size=4))
        valid_NS = padded(data.draw, counts)
        tokens_NS = random_tokens(*valid_NS.shape, seed)
        calls.clear()
        output = model.extend(tokens_NS, cache, budget=budget, valid_NS=valid_NS)
        taking = [record.chosen_BS.sum(1) for record in output.routing]
        assert calls == [
            (number, int((count_N > 0).sum()), int(count_N.max()))
            for number, count_N in enumerate(taking)
            if count_N.any()
        ]


@quick(60)
@given(
    st.integers(1, 4),
    st.sampled_from([(None, None), (1, None), (40, None), (None, 0), (None, 2), (None, 40)]),
    st.sampled_from([0, 5]),
    st.data(),
)
def test_a_store_equals_lists(batch, kind, margin, data):
    window, last = kind
    store, slow = RaggedStore(batch, window, last, margin), SlowStore(batch)
    seen, furthest = [0] * batch, [0] * batch
    for _ in range(data.draw(st.integers(1, 12))):
        rows = sorted(data.draw(st.permutations(range(batch)))[: data.draw(st.integers(1, batch))])
        width = data.draw(st.sampled_from([1, 3, 20]))
        counts = [data.draw(st.sampled_from([width, 0, width // 2])) for _ in rows]
        append(store, slow, rows, counts, seen, width, data)
        furthest = [max(pair) for pair in zip(seen, furthest, strict=True)]
        if data.draw(st.booleans()):
            back = data.draw(st.permutations(range(batch)))[: data.draw(st.integers(1, batch))]
            least = margin if window or last is not None else 999
            seen_at = [max(0, furthest[r] - data.draw(st.integers(0, least))) for r in back]
            seen_at = [min(at, seen[r]) for r, at in zip(back, seen_at, strict=True)]
            store.truncate(back, seen_at)
            for row, at in zip(back, seen_at, strict=True):
                slow.rows[row] = [entry for entry in slow.rows[row] if entry[0] < at]
                seen[row] = at
        for row, entries in enumerate(slow.rows):
            actual = kept(store, row)
            assert actual == entries[len(entries) - len(actual) :]
            needed = slow.seen_by(row, window, last, seen[row])
            assert len(actual) >= len(needed)
            if window is None and last is None:
                assert actual == entries
        all_of_them = range(batch)
        every = store.fields(all_of_them)
        assert all(x.isfinite().all() for x in every)
        few = [*store.fields(rows), store.positions(rows), store.documents(rows)]
        whole = [*every, store.positions(all_of_them), store.documents(all_of_them)]
        for number, row in enumerate(rows):
            length = store.lengths[row]
            for x_NL, y_BL in zip(few, whole, strict=True):
                assert torch.equal(x_NL[number, :length], y_BL[row, :length])
        # A number and its position, and its document where there was any.
        item = 8 * (2 + bool(store.documents(all_of_them).any()))
        assert store.allocated_bytes() in (
            batch * store.allocated_length * size for size in (item, 24)
        )


@quick(40)
@given(st.integers(0, 4), st.lists(st.integers(0, 6), min_size=3, max_size=3), st.data())
def test_latest_are_the_last_ones_with_nothing_in_front(count, lengths, data):
    store = RaggedStore(3, last=6)
    rows = sorted(data.draw(st.permutations(range(3)))[: data.draw(st.integers(1, 3))])
    positions_NK = torch.arange(6).expand(3, 6)
    field_NK1 = normal(3, 6, 1)
    store.append([0, 1, 2], lengths, (field_NK1,), positions_NK, positions_NK + 10)
    view = CacheView(store, rows, [1] * len(rows))
    actual, documents = view.latest(count, field_NK1[:1])
    assert actual.shape == (len(rows), count, 1)
    assert documents.shape == (len(rows), count)
    for number, row in enumerate(rows):
        for back in range(1, count + 1):
            place = lengths[row] - back
            is_there = place >= 0
            assert documents[number, count - back] == (place + 10 if is_there else -1)
            assert actual[number, count - back] == (field_NK1[row, place] if is_there else 0)


def appended(store: RaggedStore, count: int, most: int | None = None) -> int:
    """Append tokens one by one; how often all was moved to new memory."""
    moves, memory = 0, 0
    field_N11 = torch.zeros(1, 1, 1)
    for position in range(count):
        store.append([0], [1], (field_N11,), torch.tensor([[position]]), None)
        now = store.positions([0]).untyped_storage().data_ptr()
        moves, memory = moves + (now != memory), now
        assert most is None or store.allocated_length <= most
    return moves


@pytest.mark.parametrize(
    ("window", "last", "margin"),
    [
        *((None, None, 0), (16, None, 0), (32, None, 0), (60, None, 4), (100, None, 10)),
        *((None, 2, 0), (None, 2, 20), (None, 31, 0)),
    ],
)
def test_memory_is_bounded_and_seldom_moved(window, last, margin):
    """Every token moves a constant share of the store, at most."""
    store = RaggedStore(1, window, last, margin)
    if window is None and last is None:
        assert appended(store, 10_000) < 150
        assert store.allocated_length < 10_000 * 33 / 32 + 32
        return
    looked_at = (window or last) + margin
    assert appended(store, 3000, looked_at * 33 // 32 + 32) < 3000 / 4


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize(("window", "last"), [(20, None), (None, 19)])
def test_rows_at_different_places_stay_bounded_and_keep_what_they_look_at(window, last):
    """The last row waits while the others continue."""
    store = RaggedStore(4, window, last, margin=5)
    seen = [0, 0, 0, 30]
    store.append([3], [30], (torch.zeros(1, 30, 1),), torch.arange(30)[None], None)
    for step in range(1200):
        rows = [row for row in range(3) if step % (row + 1) == 0]
        positions_NK = torch.tensor([[seen[row]] for row in rows])
        field_NK1 = positions_NK[..., None].float()
        store.append(rows, [1] * len(rows), (field_NK1,), positions_NK, None)
        for row in rows:
            seen[row] += 1
        assert store.allocated_length <= 25 * 9 // 8 + 64
        assert store.fields(range(4))[0].isfinite().all()
    for row in range(4):
        assert [p for p, _, _ in kept(store, row)][-24:] == list(range(seen[row] - 24, seen[row]))


def test_bytes_are_those_of_the_stores():
    config = small(num_kv_heads=1, mixer=["attention", "convolution", "attention", "attention"])
    run = run_of(ready(config, 24, dtype=torch.float32), 40, 9, budget=ComputeBudget(layer_cap=0.5))
    assert run.cache.allocated_bytes() == 0
    run.step(40, 9)
    assert [run.cache.layers[layer].lengths for layer in (0, 2)] == [[40, 9]] * 2
    # Keys and values of a head of 8, or 16 features, and where the token stands.
    buffers = [*((s, 72) for s in run.cache.layers), *((s, 8) for s in run.cache.routed)]
    assert run.cache.allocated_bytes() == sum(2 * s.allocated_length * size for s, size in buffers)
    assert all(sum(store.lengths) for store in run.cache.routed)


# Going back.


@quick(30)
@given(cached_configs(), st.data())
def test_going_back_undoes_what_came_behind(config, data):
    """To any place within the margin, by rows, with tokens that continue differently."""
    model, budget = ready(config, 24), data.draw(budgets(config))
    margin = 9
    run = run_of(model, 20, 20, 20, margin=margin, budget=budget)
    start = data.draw(st.lists(st.integers(1, 10), min_size=3, max_size=3))
    more = data.draw(st.lists(st.integers(0, margin), min_size=3, max_size=3))
    run.step(*start)
    settings = {"rows": [0, 1, 2], **run.settings}
    if any(more):
        wrong_NS = random_tokens(3, max(more), 77)
        model.extend(wrong_NS, run.cache, valid_NS=ragged(*more), **settings)
    # In two steps, one sequence after another.
    for row, (kept_to, extra) in enumerate(zip(start, more, strict=True)):
        run.cache.truncate([kept_to + extra // 2], [row])
        run.cache.truncate([kept_to], [row])
    assert run.cache.seen == start
    run.step(*(20 - n for n in start))
    assert_each_alone(run)


LOOKS = {
    "window": {"sliding_window": 3},
    "convolution": {"mixer": "convolution", "conv_width": 4},
    "routed window": {"sliding_window": 3, "pattern": "every", "capacity": 0.5},
    "routed convolution": {"mixer": "convolution", "pattern": "every", "capacity": 0.5},
}


def after_going_back(changes: dict, steps: list[int], margin: int) -> None:
    """Run 80 tokens, truncate by steps, continue: as if the dropped ones had never been."""
    config = small(num_layers=2, **({"pattern": "dense"} | changes))
    run = run_of(ready(config, 24), 80, margin=margin)
    for _ in range(79):
        run.step(1)
    for step in steps:
        run.cache.truncate([run.cache.seen[0] - step])
    (at,) = run.cache.seen
    run.outputs[0] = run.outputs[0].truncated(at)
    run.texts[0][at:] = random_tokens(1, 80 - at, 9)[0]
    run.step(80 - at)
    assert_each_alone(run)


@pytest.mark.parametrize("looks", LOOKS)
@pytest.mark.parametrize("margin", [0, 6])
def test_the_margin_is_kept_of_what_is_forgotten(looks, margin):
    after_going_back(LOOKS[looks], [margin], margin)


@pytest.mark.parametrize("looks", ["window", "convolution"])
def test_steps_back_beyond_the_margin_are_refused_for_all_rows(looks):
    with pytest.raises(ValueError, match="margin of 6"):
        after_going_back(LOOKS[looks], [6] * 6, 6)


@pytest.mark.parametrize("changes", [{}, {"pattern": "every", "capacity": 0.5}])
def test_a_full_cache_can_be_truncated_anywhere(changes):
    after_going_back(changes, [30, 40, 9], 0)


def test_a_truncation_that_is_not_possible_is_refused():
    for changes, margin, good, bad in (
        ({"sliding_window": 3}, 2, 8, 7),
        ({"mixer": "convolution"}, 0, 10, 9),
        ({}, 0, 0, 11),
    ):
        run = run_of(ready(small(**changes), 24), 10, 10, margin=margin)
        run.step(10, 10)
        for wrong in (bad, 11):
            with pytest.raises(ValueError, match=f"cannot truncate to {wrong}"):
                run.cache.truncate([wrong], [1])
        run.cache.truncate([good], [1])
        assert run.cache.seen == [10, good]


@pytest.mark.parametrize("places", [[3, 11], [-1, 3]])
def test_a_refused_way_back_changes_nothing(places):
    run = run_of(ready(small(), 24), 10, 10)
    run.step(10, 10)
    with pytest.raises(ValueError, match="cannot truncate"):
        run.cache.truncate(places)
    assert run.cache.seen == [10, 10]


@quick(20)
@given(cached_configs(), st.data())
def test_a_row_that_is_reset_is_new(config, data):
    model, budget = ready(config, 24), data.draw(budgets(config))
    run = run_of(model, 12, 12, budget=budget)
    run.step(7, 5)
    run.cache.reset(0)
    run.outputs[0], run.texts[0] = TokenOutputs(), random_tokens(1, 12, 9)[0]
    for counts in ((3, 4), (1, 1), (8, 2)):
        run.step(*counts)
    assert_each_alone(run)


# What is not a number stays where it is.

POISON = 5


def poisoned(config, value: float):
    """A model that a token of `POISON` gives this value in every layer."""
    model = ready(config, 24)
    with torch.no_grad():
        model.embedding.weight[POISON] = value
    return model


def clean(run: Run, row: int) -> None:
    run.texts[row][run.texts[row] == POISON] = POISON + 1


@quick(30)
@given(cached_configs(), st.sampled_from([float("nan"), float("inf")]), st.data())
def test_what_is_no_number_never_reaches_another_sequence(config, value, data):
    config.tie_embeddings = False
    model = poisoned(config, value)
    run = run_of(model, 14, 14, 14, budget=data.draw(budgets(config)))
    for row in range(3):
        clean(run, row)
    run.texts[1][data.draw(st.integers(0, 9))] = POISON
    for counts in ((3, 5, 4), (1, 1, 1), (4, 6, 0), (6, 2, 9)):
        run.step(*counts)
    assert not torch.cat(run.outputs[1].logits).isfinite().all()
    run.texts[1], run.outputs[1] = run.texts[0], run.outputs[0]
    assert_each_alone(run)


@pytest.mark.parametrize("how", ["reset", "truncate"])
def test_what_is_no_number_goes_with_its_token(how):
    run = run_of(poisoned(small(num_layers=2, tie_embeddings=False), float("nan")), 12, 12)
    for row in range(2):
        clean(run, row)
    run.texts[0][3] = POISON
    # In two calls: what is no number also reaches the earlier tokens of its own call.
    run.step(2, 3)
    run.step(4, 7)
    if how == "reset":
        run.cache.reset(0)
    else:
        run.cache.truncate([2], [0])
    run.outputs[0] = run.outputs[0].truncated(run.cache.seen[0])
    run.texts[0][3] = POISON + 1
    for counts in ((1, 1), (11 - run.cache.seen[0], 1)):
        run.step(*counts)
    assert_each_alone(run)
