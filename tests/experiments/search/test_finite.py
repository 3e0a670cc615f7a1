"""Spaces of finitely many points: each is tried once."""

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modtrain.experiments.search.config import parse_space
from modtrain.experiments.search.finite import draw_untried, num_points


def dimensions_of(**space):
    dimensions, problems = parse_space(space)
    assert problems == []
    return {dimension.key: dimension for dimension in dimensions}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("choice(x,y,x)", 2),
        ("int(interval(1,4))", 4),
        ("int(tag(log,interval(1,4)))", 4),
        ("range(2,9,3)", 3),
        ("range(0.1,0.5,0.1)", 4),
        ("interval(3,3)", 1),
        ("interval(0.1,1)", None),
    ],
)
def test_the_number_of_values_is_counted(text, size):
    (dimension,) = dimensions_of(a=text).values()
    assert dimension.size == size
    for index in range(size or 0):
        assert dimension.index_of(dimension.value_at(index)) == index


def test_one_interval_makes_a_space_endless():
    ends = dimensions_of(a="choice(x,y)", b="interval(0,1)")
    assert num_points(list(ends.values())) is None
    assert num_points([ends["a"]]) == 2


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    repeated=st.integers(0, 3),
    directions=st.sampled_from([["minimize"], ["minimize", "minimize"]]),
)
def test_each_point_is_drawn_once_and_then_none(seed, repeated, directions):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    named = dimensions_of(a="choice(x,y)", b="int(interval(1,2))", c="range(0.1,0.5,0.2)")
    study = optuna.create_study(directions=directions)
    # A study from before has the same point more than once.
    for _ in range(repeated):
        study.enqueue_trial({"a": "x", "b": 1, "c": 0.1})
    points = []
    for number in range(20):
        if number >= repeated:
            values = draw_untried(study, named, seed + number)
            if values is None:
                break
            study.enqueue_trial(values)
        trial = study.ask()
        points.append(tuple(d.suggest(trial, name) for name, d in named.items()))
        if number % 2:
            study.tell(trial, [float(number)] * len(directions))
    assert len(points) == 8 + max(0, repeated - 1)
    assert len(set(points)) == 8


def test_what_optuna_draws_is_taken_where_it_is_new():
    named = dimensions_of(a="int(interval(1,1000))", b="choice(x,y)")
    study = optuna.create_study()
    drawn = [draw_untried(study, named, seed) for seed in range(5)]
    for seed, values in enumerate(drawn):
        alone = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed)).ask()
        assert values == {name: d.suggest(alone, name) for name, d in named.items()}
