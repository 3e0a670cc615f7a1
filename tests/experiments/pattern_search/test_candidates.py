"""Candidates: within their limits, of their form, all different, and the same for one seed."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modtrain.cli.compose_verbs import compose_pattern_search
from modtrain.experiments.pattern_search.candidates import Parametrization, find_candidates
from modtrain.experiments.pattern_search.config import PARAMETRIZATIONS
from modtrain.models.depth.config import RouterConfig
from modtrain.models.depth.pattern import layer_capacities, num_chosen
from modtrain.models.flops import forward_flops
from tests.experiments.pattern_search.search_cases import (
    SMALL,
    WITHOUT_DATA,
    WSD,
    candidates,
    composed,
    space,
)
from tests.helpers.model_cases import quick
from tests.helpers.problems import problems_of


@quick(8)
@given(
    st.integers(0, 1000),
    st.integers(3, 9),
    st.sampled_from([(0.0, 1.0), (0.3, 0.5), (0.55, 0.6)]),
    st.floats(0, 1),
)
def test_draws_are_within_their_limits_of_their_form_and_different(seed, layers, limits, dense):
    low, high = limits
    of = space(layers, 64)
    changes = {"sampler_seed": seed, "flops_min": low, "flops_max": high, "dense_share": dense}
    try:
        drawn = candidates(of, knots=3, **changes)
    except Exception as error:
        # Few layers and all knots dense leave few patterns.
        assert "is more than there are" in str(error)
        return
    assert len({c.capacities for c in drawn}) == len(drawn) == 9
    dense_model = replace(of.model, pattern="dense", router=RouterConfig())
    for candidate in drawn:
        capacities = candidate.capacities
        assert len(capacities) == layers
        assert any(c != 1 for c in capacities)
        assert all(c * 64 == num_chosen(c, 64) >= 1 for c in capacities)
        model = candidate.apply(of.model)
        share = forward_flops(model, 64).total / forward_flops(dense_model, 64).total
        assert candidate.flops_over_dense == share
        assert low <= share <= high
        if candidate.origin == "symmetric":
            assert capacities == capacities[::-1]
        elif candidate.origin == "monotone":
            falls = all(a >= b for a, b in pairwise(capacities))
            assert falls or all(a <= b for a, b in pairwise(capacities))
        else:
            assert set(capacities) <= {0.125, 0.25, 0.5, 1.0}


def test_one_seed_gives_the_same_candidates_and_more_draws_keep_the_first():
    first = candidates(num_drawn=7)
    assert candidates(num_drawn=7) == first
    assert candidates(num_drawn=12)[:7] == first
    assert candidates(num_drawn=7, sampler_seed=1) != first
    assert [c.name for c in first] == [f"c{number:03d}" for number in range(7)]
    assert [c.origin for c in first] == [*PARAMETRIZATIONS, *PARAMETRIZATIONS, "monotone"]


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_draws_are_spread_over_the_forward_flops(name):
    drawn = candidates(space(24), parametrizations=[name], num_drawn=32, flops_min=0.2)
    flops = sorted(c.flops_over_dense for c in drawn)
    # Uniform capacities of 24 layers would have nearly all their FLOPs in the middle.
    counts = np.histogram(flops, bins=4, range=(0.2, 1.0))[0]
    assert counts.min() >= 4, counts


def test_both_directions_and_dense_layers_are_drawn():
    drawn = candidates(parametrizations=["monotone"], num_drawn=16, flops_max=0.9)
    falling = [c for c in drawn if c.capacities[0] > c.capacities[-1]]
    assert 4 <= len(falling) <= 12
    assert any(1.0 in c.capacities for c in drawn)


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_a_tilt_lowers_every_capacity(name):
    parametrization = Parametrization(composed().config, name, 7)
    point = np.random.default_rng(0).random(parametrization.num_coordinates)
    drawn = [parametrization.capacities(point, tilt) for tilt in (0.1, 0.5, 1.0, 2.0, 9.0)]
    assert all((a >= b).all() for a, b in pairwise(drawn))
    assert all(((c > 0) & (c <= 1)).all() for c in drawn)
    assert drawn[0].sum() > drawn[-1].sum()


def test_given_patterns_come_first_in_whole_tokens():
    given = ["every_other", "cosine", [1, 0.3, 0.3, 1], "[1, .5]*2"]
    of = space(4)
    drawn, notes = find_candidates(replace(composed().config, patterns=given, num_drawn=2), of)
    assert notes == []
    assert [c.origin for c in drawn[:4]] == [str(pattern) for pattern in given]
    for pattern, candidate in zip(given, drawn, strict=False):
        capacities = layer_capacities(pattern, of.model.capacity, 4)
        rounded = [1.0 if c is None else round(c * 64) / 64 for c in capacities]
        assert list(candidate.capacities) == rounded
    assert len(drawn) == 6


def test_a_given_pattern_off_the_limits_or_twice_is_named():
    given = ["every_other", "[1, .125]*2", "every", "[1, 1, 1, 1]"]
    config = replace(composed().config, patterns=given, num_drawn=1, flops_min=0.5)
    drawn, notes = find_candidates(config, space(4))
    assert [c.origin for c in drawn] == ["every_other", "monotone"]
    same, off, dense = notes
    assert same == "[1, .125]*2 is left out: it is the same as every_other"
    assert off.startswith("every is left out: it has 0.")
    assert dense.startswith("[1, 1, 1, 1] is left out: it is no pattern")


def test_patterns_that_the_model_does_not_take_are_not_drawn():
    of = space(4)
    model = replace(of.model, router=replace(of.model.router, score="attention"))
    attention = type(of)(model, 64)
    for candidate in candidates(attention, num_drawn=6, parametrizations=["free"]):
        assert not candidate.apply(model).problems()
        assert candidate.capacities[0] == 1


@pytest.mark.slow
def test_more_draws_than_patterns_are_refused():
    few = {"levels": [0.5, 1.0], "parametrizations": ["free"]}
    assert len(candidates(space(2), num_drawn=3, **few)) == 3
    problems = problems_of(candidates, space(2), num_drawn=4, **few)
    assert "3 patterns have" in problems["num_drawn"].reason
    problems = problems_of(candidates, num_drawn=1, flops_max=0.01)
    assert "0 patterns have" in problems["num_drawn"].reason


def test_everything_wrong_with_a_search_comes_at_once():
    problems = _problems(
        *("budgets=[3e9,1e9]", "budget.flops=3", "keep=0", "schedule=cosine"),
        *("capacity_schedule=linear", "patterns=[zigzag]", "parametrizations=[spline]"),
        *("knots=1", "levels=[0.5]", "capacity_min=0", "flops_min=2", "best=first"),
        *("output=best.txt", "branch.run=x", "branch.step=1", "dense_share=2", "num_drawn=-1"),
        "sweep.retries=true",
    )
    assert {
        *("budgets", "budget.flops", "keep", "schedule.name", "schedule.warmup_steps"),
        *("capacity_schedule.name", "patterns", "parametrizations", "knots", "levels"),
        *("capacity_min", "flops_min", "best", "output", "branch.run", "dense_share"),
        *("num_drawn", "sweep.retries"),
    } == set(problems)
    assert all(problem.remedy for problem in problems.values())


def _problems(*overrides):
    return problems_of(compose_pattern_search, ["model=tiny", *WITHOUT_DATA, *overrides])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("budgets=[]", "budgets"),
        ("budgets=[-1]", "budgets.0"),
        ("patterns=[dense]", "patterns"),
        ("levels=[0.5,2]", "levels"),
        ("parametrizations=[]", "parametrizations"),
    ],
)
def test_a_wrong_value_is_named(override, key):
    assert set(_problems(*SMALL, *WSD, override)) == {key}


def test_no_candidate_is_a_mistake():
    assert set(_problems(*SMALL, *WSD, "patterns=[]", "num_drawn=0")) == {"num_drawn"}
