"""The named patterns: which layers they route, and how their capacities run over depth."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modtrain.models.config import ModelConfig
from modtrain.models.depth.pattern import PATTERNS, layer_capacities, pattern_problems

QUICK = settings(max_examples=200, deadline=None, derandomize=True)
GRADED = ("cosine", "ramp_down", "ramp_up", "u_shape")
LAYERS = st.integers(3, 60)
CAPACITY = st.floats(0.001, 0.999)


def by_formula(pattern, capacity, layers):
    """Share of the tokens that each layer takes, 1 for a dense one, by its place of 0 to 1."""
    places = [layer / (layers - 1) for layer in range(layers)]
    # What a parabola through both ends leaves of a middle that has no layer.
    lowest = min((2 * place - 1) ** 2 for place in places)
    falls = {
        "ramp_down": lambda place: place,
        "ramp_up": lambda place: 1 - place,
        "cosine": lambda place: (1 - math.cos(math.pi * place)) / 2,
        "u_shape": lambda place: (1 - (2 * place - 1) ** 2) / (1 - lowest),
        "all_but_ends": lambda place: 0 < place < 1,
        "every": lambda place: 1,
        "every_other": lambda place: round(place * (layers - 1)) % 2,
        "dense": lambda place: 0,
    }
    return [1 - (1 - capacity) * falls[pattern](place) for place in places]


@QUICK
@given(st.sampled_from(PATTERNS), CAPACITY, LAYERS)
def test_a_pattern_is_its_formula(pattern, capacity, layers):
    actual = layer_capacities(pattern, capacity, layers)
    expected = by_formula(pattern, capacity, layers)
    assert [1.0 if share is None else share for share in actual] == pytest.approx(expected)
    # To the bit: the dense layers are dense, and the lowest has the capacity itself.
    assert [share is None for share in actual] == [share == 1 for share in expected]
    assert pattern == "dense" or min(filter(None, actual)) == capacity
    assert ModelConfig(num_layers=layers, pattern=pattern, capacity=capacity).problems() == []


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
def test_impossible_depths_are_reported_under_their_own_key(pattern, layers):
    problems = pattern_problems(pattern, 0.25, layers, "model")
    assert problems == []
