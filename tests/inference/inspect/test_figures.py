"""The statistics and colours of the figures."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modtrain.inference.inspect.figures import (
    binned,
    even_edges,
    frequencies,
    histograms,
    ink_on,
    luminance,
    quantile_edges,
    themes,
)
from tests.helpers.model_cases import quick
from tests.inference.inspect.inspect_cases import contrast


def slow_bins(x, y, edges):
    rows = []
    for number, (low, high) in enumerate(pairwise(edges)):
        last = number == len(edges) - 2
        inside = [
            (a, b) for a, b in zip(x, y, strict=True) if low <= a < high or (last and a == high)
        ]
        if inside:
            mean = sum(b for _, b in inside) / len(inside)
            square = sum((b - mean) ** 2 for _, b in inside)
            error = math.nan
            if len(inside) > 1:
                error = math.sqrt(square / (len(inside) - 1) / len(inside))
            rows.append((sum(a for a, _ in inside) / len(inside), mean, error, len(inside)))
    return rows


@given(
    st.lists(
        st.tuples(st.integers(-5, 30).map(lambda n: n / 4), st.integers(0, 4)),
        min_size=1,
        max_size=60,
    ),
    st.sampled_from([even_edges, quantile_edges]),
    st.integers(1, 12),
)
@quick(80)
def test_binned_means_are_those_of_a_slow_loop(points, edges_of, most):
    x, y = (np.array(side) for side in zip(*points, strict=True))
    edges = edges_of(x, most)
    assert len(edges) - 1 <= most
    assert edges[0] <= x.min()
    assert x.max() <= edges[-1]
    bins = binned(x, y, edges)
    actual = list(zip(bins.x, bins.mean, bins.error, bins.count, strict=True))
    expected = slow_bins(x.tolist(), y.tolist(), edges.tolist())
    assert len(actual) == len(expected)
    for one, two in zip(actual, expected, strict=True):
        assert one == pytest.approx(two, nan_ok=True)
    assert sum(bins.count) == len(points)


def test_frequencies_are_counts():
    tokens = [3, 1, 3, 3, 2, 1]
    assert frequencies(np.array(tokens)).tolist() == [tokens.count(token) for token in tokens]


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60), st.floats(-2e3, 2e3))
@quick(60)
def test_a_histogram_misses_no_value_and_moves_none_over_the_threshold(values, threshold):
    value_N = np.array([value for value in values if value != threshold] or [threshold + 1])
    for bar, chosen_N in ((threshold, value_N > threshold), (None, value_N > np.median(value_N))):
        edges, chosen, skipped = histograms(value_N, chosen_N, bar)
        assert (chosen.sum(), skipped.sum()) == (chosen_N.sum(), (~chosen_N).sum())
        assert 2 <= len(edges) < 50
        if bar is not None:
            assert bar in edges
            assert chosen[edges[:-1] < bar].sum() == skipped[edges[:-1] >= bar].sum() == 0


@pytest.mark.parametrize("levels", [1, 4, 24])
def test_colours_run_evenly_away_from_the_ground_and_carry_readable_letters(levels):
    for theme in themes(levels):
        shades = [luminance(color) for color in [theme.ground, *theme.levels]]
        assert shades == sorted(shades, reverse=theme.name == "light")
        assert contrast(theme.text, theme.ground) > 10
        for color in theme.levels:
            assert contrast(ink_on(color), color) >= 4.5
