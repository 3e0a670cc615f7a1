import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modtrain.data.stream.order import SampleOrder

sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**63)


@settings(deadline=None)
@given(sizes, seeds, st.integers(0, 10**6))
def test_an_epoch_is_a_permutation(num_samples, seed, epoch):
    order = SampleOrder(num_samples, seed)
    numbers = order.lookup(np.arange(epoch * num_samples, (epoch + 1) * num_samples))
    assert sorted(numbers.tolist()) == list(range(num_samples))


@settings(deadline=None)
@given(sizes, seeds, st.data())
def test_a_lookup_does_not_depend_on_its_neighbours_or_shape(num_samples, seed, data):
    positions = np.array(
        data.draw(st.lists(st.integers(0, 10 * num_samples), min_size=2, max_size=20))
    )
    order = SampleOrder(num_samples, seed)
    alone = [order.lookup(np.array([position])).item() for position in positions]
    assert order.lookup(positions).tolist() == alone
    assert order.lookup(positions[:, None]).tolist() == [[number] for number in alone]


@pytest.mark.parametrize("num_samples", [100, 1000, 2**16, 99_991])
def test_epochs_and_seeds_differ(num_samples):
    epoch = np.arange(num_samples)
    first = SampleOrder(num_samples, 0).lookup(epoch)
    for other in (
        SampleOrder(num_samples, 0).lookup(epoch + num_samples),
        SampleOrder(num_samples, 1).lookup(epoch),
        SampleOrder(num_samples, 1 << 63).lookup(epoch),
    ):
        # Two random permutations agree in one place on average.
        assert np.count_nonzero(first == other) < 10


def test_not_shuffled_is_in_order():
    order = SampleOrder(5, 0, shuffle=False)
    assert order.lookup(np.arange(12)).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("num_samples", [1000, 2**15, 100_003])
def test_an_epoch_looks_random(num_samples):
    """Each statistic lies within five standard deviations of that of a random permutation."""
    position = np.arange(num_samples)
    number = SampleOrder(num_samples, 3).lookup(position)
    bound = 5 / np.sqrt(num_samples)
    assert abs(np.corrcoef(position, number)[0, 1]) < bound
    for distance in (1, 2, 7, 64):
        assert abs(np.corrcoef(number[distance:], number[:-distance])[0, 1]) < bound
    displacement = np.bincount((number - position) % num_samples * 16 // num_samples, minlength=16)
    expected = num_samples / 16
    assert np.all(np.abs(displacement - expected) < 5 * np.sqrt(expected))
    # One of two orders for every pair of neighbours.
    assert abs(np.mean(number[1:] > number[:-1]) - 0.5) < bound


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5])
def test_every_permutation_of_a_few_samples_occurs_equally_often(num_samples):
    num_permutations = math.factorial(num_samples)
    num_epochs = 200 * num_permutations
    rows = SampleOrder(num_samples, 0).lookup(np.arange(num_samples * num_epochs))
    _, counts = np.unique(rows.reshape(num_epochs, -1), axis=0, return_counts=True)
    assert len(counts) == num_permutations
    assert np.all(np.abs(counts - 200) < 5 * np.sqrt(200))


def test_a_sample_of_a_distant_position_is_found_at_once():
    order = SampleOrder(10**12, 0)
    numbers = order.lookup(np.arange(10**15, 10**15 + 1000))
    assert len(set(numbers.tolist())) == 1000
    assert 0 <= numbers.min() <= numbers.max() < 10**12


def test_an_order_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 samples"):
        SampleOrder(0, 0)
