"""The formula of a mixture's order against a slow, sequential reading of what it promises."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modtrain.common.errors import ConfigError, DataError
from modtrain.data.mixture.config import MixtureStageConfig, SourceConfig
from modtrain.data.mixture.order import MixtureOrder
from modtrain.data.mixture.schedule import make_schedule
from modtrain.data.mixture.shares import BLOCK, PERIOD, Shares, units_of
from modtrain.data.stream.order import SampleOrder

QUICK = settings(max_examples=25, deadline=None, derandomize=True)
WEIGHTS = st.lists(st.sampled_from([0, 0.003, 0.1, 1, 1.5, 7]), min_size=1, max_size=6).filter(any)


def stages_of(*stages: tuple[float, list[float]]) -> list[MixtureStageConfig]:
    """Stages that begin at so many samples of one token, with the weights of a, b, c and so on."""
    return [
        MixtureStageConfig(tokens=tokens, weights=dict(zip("abcdef", weights, strict=False)))
        for tokens, weights in stages
    ]


def order_of(weights, counts, stages=(), max_epochs=(), when="error", seed=0, shuffle=True):
    limits = [*max_epochs, *[None] * len(weights)]
    names = "abcdef"[: len(weights)]
    sources = {
        name: SourceConfig("somewhere", weight, limit)
        for name, weight, limit in zip(names, weights, limits, strict=False)
    }
    available = dict(zip(names, counts, strict=True))
    schedule = make_schedule(sources, stages, when, available, 10_000, seq_len=1)
    return MixtureOrder(schedule, counts, seed, shuffle)


@given(WEIGHTS)
@QUICK
def test_units_are_the_weights_within_one(weights):
    units, total = units_of(weights), sum(map(Fraction, weights))
    assert sum(units) == BLOCK * PERIOD
    for unit, weight in zip(units, weights, strict=True):
        assert abs(unit - Fraction(weight) * BLOCK * PERIOD / total) < 1
        assert weight or not unit


@given(WEIGHTS)
@QUICK
def test_each_block_has_each_share_within_one_sample_and_a_period_exactly(weights):
    shares = Shares(units_of(weights))
    until = np.array(shares.samples_until)
    exact = np.array(shares.units) / PERIOD
    assert (np.abs(np.diff(until, axis=0) - exact) < 1).all()
    assert (until.sum(axis=1) == np.arange(PERIOD + 1) * BLOCK).all()
    assert until[-1].tolist() == list(shares.units)
    # Nor do the errors of the blocks add up: less than a tenth of a block at any time.
    assert (np.abs(until - np.arange(PERIOD + 1)[:, None] * exact) < BLOCK / 10).all()


@st.composite
def mixtures(draw):
    weights = draw(WEIGHTS)
    counts = [draw(st.integers(1, 300)) for _ in weights]
    starts = sorted(draw(st.sets(st.integers(1, 40), max_size=3)))
    stages = stages_of(
        *((start * 64 - draw(st.integers(0, 63)), draw(weights_like(weights))) for start in starts)
    )
    return weights, counts, stages, draw(st.integers(0, 99)), draw(st.booleans())


def weights_like(weights):
    size = len(weights)
    return st.lists(st.sampled_from([0, 0.1, 1, 4]), min_size=size, max_size=size).filter(any)


@given(mixtures(), st.data())
@QUICK
def test_the_order_is_each_sources_own_one_sample_after_another(mixture, data):
    """Slow reference: sources' indexes as they are counted, block by block; no formula."""
    weights, counts, stages, seed, shuffle = mixture
    order = order_of(weights, counts, stages, seed=seed, shuffle=shuffle)
    num_blocks = 45
    sources, indexes = order.places(np.arange(num_blocks * BLOCK))
    read = [0] * len(weights)
    for block in range(num_blocks):
        mine = sources[block * BLOCK : (block + 1) * BLOCK]
        own = indexes[block * BLOCK : (block + 1) * BLOCK]
        stage = [
            [s.weights[n] for n in sorted(s.weights)] for s in stages if s.tokens <= block * 64
        ]
        current = [weights, *stage][-1]
        for source, weight in enumerate(current):
            numbers = sorted(own[mine == source].tolist())
            # Nothing is lost and nothing comes twice.
            assert numbers == list(range(read[source], read[source] + len(numbers)))
            read[source] += len(numbers)
            assert abs(len(numbers) - BLOCK * weight / sum(current)) < 1 + 1e-3
    # Any position by itself has what it has among others.
    position = data.draw(st.integers(0, num_blocks * BLOCK - 1))
    source, index = sources[position], indexes[position]
    single = SampleOrder(counts[source], seed, shuffle).lookup(index)
    assert order.lookup(np.array(position)) == sum(counts[:source]) + single


def test_a_far_position_is_found_at_once_and_is_not_read_twice():
    order = order_of([3, 1], [10**9, 10**8])
    positions = np.arange(10**12, 10**12 + 4096)
    sources, indexes = order.places(positions)
    assert len(set(zip(sources.tolist(), indexes.tolist(), strict=True))) == 4096
    assert indexes[sources == 0].min() == pytest.approx(0.75 * 10**12, rel=1e-9)


def test_slots_are_mixed_anew_in_each_block():
    sources, _ = order_of([1, 1], [50, 50]).places(np.arange(4 * BLOCK))
    blocks = {tuple(block) for block in sources.reshape(4, BLOCK).tolist()}
    assert len(blocks) == 4


@pytest.mark.parametrize(("weights", "counts"), [([1, 1, 2], [40, 10**6, 900]), ([5, 1], [9, 9])])
def test_the_weight_of_a_source_that_is_used_up_goes_to_the_others(weights, counts):
    order = order_of(weights, counts, max_epochs=[3.0], when="redistribute")
    sources, indexes = order.places(np.arange(20 * BLOCK))
    used = np.sort(indexes[sources == 0])
    # To less than one block of it before the end, each sample once an epoch, and none too much.
    fewest = 3 * counts[0] - np.ceil(BLOCK * weights[0] / sum(weights))
    assert fewest <= len(used) <= 3 * counts[0]
    assert used.tolist() == list(range(len(used)))
    last = sources[-BLOCK:]
    rest = sum(weights[1:])
    for source in range(1, len(weights)):
        assert abs((last == source).sum() - BLOCK * weights[source] / rest) < 1


def test_sources_that_are_all_used_up_end_the_stream():
    order = order_of([1, 1], [100, 200], max_epochs=[1.0, 1.0], when="redistribute")
    end = order.schedule.end
    assert 300 - 2 * BLOCK < end <= 300
    order.lookup(np.arange(end))
    with pytest.raises(DataError, match="max_epochs"):
        order.lookup(np.array([end]))


def test_a_later_stage_does_not_bring_an_ended_stream_back():
    order = order_of(
        [1, 0], [100, 900], stages_of((640, [0, 1])), max_epochs=[1.0], when="redistribute"
    )
    assert order.schedule.end == 64


def test_counts_between_two_positions_are_those_of_the_order():
    order = order_of([3, 1, 1], [70, 50, 20], stages_of((200, [0, 1, 1])))
    sources, _ = order.places(np.arange(1000))
    for start, stop in [(0, 0), (0, 63), (5, 256), (100, 999)]:
        counted = np.bincount(sources[start:stop], minlength=3).tolist()
        assert order.samples_between(start, stop) == counted


def test_stages_that_are_not_in_order_are_refused():
    with pytest.raises(ConfigError, match=r"stages\[1\].tokens"):
        order_of([1, 1], [9, 9], stages_of((900, [1, 0]), (870, [0, 1])))


def test_a_source_without_a_sample_is_refused_where_it_has_a_weight():
    order_of([1, 0], [9, 0])
    with pytest.raises(ConfigError, match=r"sources\.b"):
        order_of([1, 0], [9, 0], stages_of((900, [1, 1])))
