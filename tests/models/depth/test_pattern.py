"""The named patterns: which layers they route, and how their capacities run over depth."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modtrain.models.config import ModelConfig
from modtrain.models.depth.pattern import PATTERNS, layer_capacities, pattern_problems

QUICK = settings(max_examples=100, deadline=None, derandomize=True)
FALLING = ("cosine", "ramp_down")
GRADED = (*FALLING, "ramp_up", "u_shape")
LAYERS = st.integers(3, 60)
CAPACITY = st.floats(0.001, 0.999)


def shares(pattern, capacity, num_layers):
    """Share of the tokens that each layer takes, 1 for a dense one."""
    found = layer_capacities(pattern, capacity, num_layers)
    return [1.0 if share is None else share for share in found]


@QUICK
@given(st.sampled_from(PATTERNS), CAPACITY, st.integers(1, 60))
def test_every_pattern_has_one_capacity_a_layer_between_its_lowest_and_1(pattern, capacity, layers):
    found = layer_capacities(pattern, capacity, layers)
    assert len(found) == layers
    assert all(share is None or capacity <= share < 1 for share in found)
    if layers > 2 and pattern != "dense":
        assert min(share for share in found if share is not None) == capacity
        assert ModelConfig(num_layers=layers, pattern=pattern, capacity=capacity).problems() == []


@QUICK
@given(st.sampled_from(GRADED), CAPACITY, LAYERS)
def test_the_ends_of_a_graded_pattern_are_exact(pattern, capacity, layers):
    first, *_, last = layer_capacities(pattern, capacity, layers)
    ends = {"ramp_up": (capacity, None), "u_shape": (None, None)}
    assert (first, last) == ends.get(pattern, (None, capacity))


@QUICK
@given(st.sampled_from(FALLING), CAPACITY, LAYERS)
def test_falling_patterns_never_rise(pattern, capacity, layers):
    found = shares(pattern, capacity, layers)
    assert found == sorted(found, reverse=True)


@QUICK
@given(CAPACITY, LAYERS)
def test_ramps_are_straight_and_mirror_each_other(capacity, layers):
    up = shares("ramp_up", capacity, layers)
    assert up == shares("ramp_down", capacity, layers)[::-1]
    step = (1 - capacity) / (layers - 1)
    assert all(after - before == pytest.approx(step, abs=1e-12) for before, after in pairwise(up))


@QUICK
@given(CAPACITY, LAYERS)
def test_half_a_cosine_is_point_symmetric_and_flat_at_its_ends(capacity, layers):
    found = shares("cosine", capacity, layers)
    for share, mirrored in zip(found, found[::-1], strict=True):
        assert share + mirrored == pytest.approx(1 + capacity)
    falls = [before - after for before, after in pairwise(found)]
    half = falls[: (len(falls) + 1) // 2]
    assert all(later > earlier - 1e-12 for earlier, later in pairwise(half))
    second = capacity + (1 - capacity) * (1 + math.cos(math.pi / (layers - 1))) / 2
    assert found[1] == pytest.approx(second)


@QUICK
@given(CAPACITY, LAYERS)
def test_the_u_is_symmetric_falls_to_its_middle_and_is_a_parabola(capacity, layers):
    found = shares("u_shape", capacity, layers)
    assert found == found[::-1]
    half = found[: (layers + 1) // 2]
    assert half == sorted(half, reverse=True)
    slopes = [after - before for before, after in pairwise(found)]
    curvatures = [after - before for before, after in pairwise(slopes)]
    assert curvatures == pytest.approx([curvatures[0]] * len(curvatures), abs=1e-9)


@pytest.mark.parametrize(
    ("pattern", "layers", "expected"),
    [
        ("all_but_ends", 5, [1, 0.2, 0.2, 0.2, 1]),
        ("cosine", 5, [1, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2]),
        ("u_shape", 5, [1, 0.4, 0.2, 0.4, 1]),
        ("u_shape", 6, [1, 0.2 + 0.8 / 3, 0.2, 0.2, 0.2 + 0.8 / 3, 1]),
        ("ramp_down", 5, [1, 0.8, 0.6, 0.4, 0.2]),
        ("ramp_up", 3, [0.2, 0.6, 1]),
    ],
)
def test_patterns_by_hand(pattern, layers, expected):
    assert shares(pattern, 0.2, layers) == pytest.approx(expected)


@pytest.mark.parametrize("pattern", GRADED)
def test_a_single_layer_is_at_the_capacity_and_a_capacity_of_1_is_dense(pattern):
    assert layer_capacities(pattern, 0.25, 1) == [0.25]
    assert layer_capacities(pattern, 1.0, 4) == [None] * 4
    assert pattern_problems(pattern, 0.25, 1, "model") == []


@pytest.mark.parametrize(
    ("pattern", "layers"), [("all_but_ends", 1), ("all_but_ends", 2), ("u_shape", 2)]
)
def test_a_pattern_whose_dense_ends_are_all_the_layers_is_refused(pattern, layers):
    (problem,) = ModelConfig(num_layers=layers, pattern=pattern).problems()
    assert problem.key == "model.pattern"
    assert "routes nothing" in problem.reason
    assert str(layers) in problem.reason


def test_an_unknown_name_is_answered_with_the_known_ones():
    (problem,) = ModelConfig(pattern="u-shape").problems()
    assert all(name in problem.remedy for name in PATTERNS)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("layers", [0, -1, 10**9])
def test_impossible_depths_are_told_by_their_own_key(pattern, layers):
    found = pattern_problems(pattern, 0.25, layers, "model")
    assert found == []
