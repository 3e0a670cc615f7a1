import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modtrain.common.errors import DataError
from modtrain.data.stream import samplers as batches
from modtrain.data.stream.order import SampleOrder
from modtrain.data.stream.samplers import BatchPlan, EvalBatchSampler, RankBatchSampler


def stream(order: SampleOrder, size: tuple[int, int, int], steps: int, start: int) -> list[int]:
    """All sample numbers from ``start`` on: by step, micro-batch, rank and slot."""
    world_size, micro_batch_size, accumulate = size
    ranks = []
    for rank in range(world_size):
        plan = BatchPlan(micro_batch_size, accumulate, steps, world_size, rank)
        ranks.append(list(RankBatchSampler(order, plan, start)))
    return [number for micro in zip(*ranks, strict=True) for batch in micro for number in batch]


# (world size, micro-batch size, accumulation) with one product.
SAME_STEP = [
    (w, m, 24 // (w * m)) for w in (1, 2, 3, 4, 8) for m in (1, 2, 3, 6) if 24 % (w * m) == 0
]


@settings(deadline=None)
@given(
    st.sampled_from(SAME_STEP),
    st.integers(1, 200),
    st.integers(0, 99),
    st.integers(0, 12),
    st.data(),
)
def test_the_stream_is_one_for_every_way_to_share_it(size, num_samples, seed, steps, data):
    order = SampleOrder(num_samples, seed)
    start = data.draw(st.integers(0, steps))
    expected = order.lookup(np.arange(start * 24, steps * 24)).tolist()
    assert stream(order, size, steps, start) == expected


def test_batches_do_not_depend_on_how_many_are_looked_up_at_once(monkeypatch):
    sampler = RankBatchSampler(SampleOrder(50, 0), BatchPlan(2, 3, 40, 2, 1))
    at_once = list(sampler)
    monkeypatch.setattr(batches, "_LOOKUP_POSITIONS", 13)
    assert list(sampler) == at_once


def test_the_length_is_that_of_the_whole_run():
    sampler = RankBatchSampler(SampleOrder(50, 0), BatchPlan(2, 3, 10), start_step=8)
    assert len(sampler) == 30
    assert len(list(sampler)) == 6


@pytest.mark.parametrize("start_step", [-1, 11])
def test_a_start_outside_the_run_is_refused(start_step):
    with pytest.raises(ValueError, match="start_step"):
        RankBatchSampler(SampleOrder(50, 0), BatchPlan(2, 3, 10), start_step)


@pytest.mark.parametrize(
    "numbers", [(0, 1, 1), (1, 0, 1), (1, 1, -1), (1, 1, 1, 0), (1, 1, 1, 2, 2), (1, 1, 1, 1, -1)]
)
def test_an_impossible_plan_is_refused(numbers):
    with pytest.raises(ValueError, match=r"not 1 or more|no such plan"):
        BatchPlan(*numbers)


@given(st.integers(1, 8), st.integers(1, 100), st.integers(1, 10))
def test_validation_counts_each_sample_once(world_size, num_samples, batch_size):
    samplers = [
        EvalBatchSampler(num_samples, batch_size, world_size, rank) for rank in range(world_size)
    ]
    for rank, sampler in enumerate(samplers):
        actual = list(sampler)
        numbers = [number for batch in actual for number in batch]
        if rank < num_samples:
            assert numbers == list(range(rank, num_samples, world_size))
        else:
            assert len(numbers) == 1 and numbers[0] < num_samples
        assert sampler.is_repeat is (rank >= num_samples)
        assert len(actual) == len(sampler)
        assert all(1 <= len(batch) <= max(2, batch_size) for batch in actual)
    assert len({len(sampler) for sampler in samplers}) == 1


def test_validation_on_one_rank_is_in_full_batches():
    assert list(EvalBatchSampler(10, 4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_validation_without_samples_is_refused():
    with pytest.raises(DataError, match="no samples"):
        EvalBatchSampler(0, 1, 4, 0)
