"""Non-dominated sorting against its definition, and survivors that are spread along the front."""

import math

import optuna
from hypothesis import given
from hypothesis import strategies as st

from modtrain.experiments.pattern_search.selection import crowding_distances, select, sort_fronts
from tests.helpers.model_cases import quick

# Few values, so that ties are common.
VALUES = st.integers(0, 6).map(float)
POINTS = st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=14).map(
    lambda points: {f"c{number}": point for number, point in enumerate(points)}
)


def dominates(one, other):
    no_worse = all(a <= b for a, b in zip(one, other, strict=True))
    return no_worse and one != other


def fronts_by_definition(points):
    left, fronts = set(points), []
    while left:
        front = {n for n in left if not any(dominates(points[o], points[n]) for o in left)}
        fronts.append(front)
        left -= front
    return fronts


@quick(200)
@given(POINTS)
def test_fronts_are_those_of_the_definition(points):
    fronts = sort_fronts(points)
    assert [set(front) for front in fronts] == fronts_by_definition(points)
    assert sorted(name for front in fronts for name in front) == sorted(points)


@quick(5)
@given(POINTS)
def test_the_first_front_is_optunas(points):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize", "minimize"])
    for name, values in points.items():
        attributes = {"name": name}
        study.add_trial(optuna.trial.create_trial(values=values, user_attrs=attributes))
    expected = {trial.user_attrs["name"] for trial in study.best_trials}
    assert set(sort_fronts(points)[0]) == expected


@quick(100)
@given(POINTS, st.integers(1, 14), st.randoms(use_true_random=False))
def test_no_survivor_is_of_a_later_front_than_one_left_out(points, count, random):
    chosen = select(points, count)
    assert len(chosen) == len(set(chosen)) == min(count, len(points))
    rank = {name: r for r, front in enumerate(sort_fronts(points)) for name in front}
    out = set(points) - set(chosen)
    assert not out or max(rank[n] for n in chosen) <= min(rank[n] for n in out)
    names = list(points)
    random.shuffle(names)
    assert sorted(select({n: points[n] for n in names}, count)) == sorted(chosen)


@quick(50)
@given(st.lists(st.integers(0, 1000), min_size=3, max_size=12, unique=True), st.integers(2, 12))
def test_both_ends_of_a_front_survive(losses, count):
    losses = sorted(losses)
    points = {f"c{n}": (float(loss), -float(loss)) for n, loss in enumerate(losses)}
    chosen = select(points, count)
    assert {"c0", f"c{len(losses) - 1}"} <= set(chosen)
    assert select(points, 1) == ["c0"]


def test_of_a_crowd_one_stays():
    places = (0.0, 0.2, 0.49, 0.5, 0.51, 0.8, 1.0)
    points = {f"c{n}": (x, 1 - x) for n, x in enumerate(places)}
    # By the first distances all three in the middle would fall.
    chosen = set(select(points, 4))
    assert {"c0", "c6"} < chosen
    assert len(chosen & {"c2", "c3", "c4"}) == 1


def test_distances_are_sums_of_relative_gaps():
    points = {"a": (0.0, 100.0), "b": (1.0, 40.0), "c": (4.0, 0.0)}
    distances = crowding_distances(["a", "b", "c"], points)
    assert distances == {"a": math.inf, "b": 2.0, "c": math.inf}
    points = {"a": (0.0, 100.0), "b": (1.0, 40.0), "c": (2.0, 20.0), "d": (4.0, 0.0)}
    assert crowding_distances(list(points), points)["b"] == 2 / 4 + 80 / 100
