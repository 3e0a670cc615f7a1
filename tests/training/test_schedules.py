import math
from bisect import bisect_right
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modtrain.models.config import ModelConfig
from modtrain.training.config import TrainConfig
from modtrain.training.schedule_config import (
    CAPACITY_SCHEDULES,
    SCHEDULES,
    CapacityScheduleConfig,
    ScheduleConfig,
)
from modtrain.training.schedules import (
    capacity_stages,
    decay_start,
    level_capacities,
    level_starts,
    lr_factor,
)

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
SHARE = st.floats(0.01, 1)
FINAL = st.lists(st.none() | SHARE, min_size=1, max_size=4)
STEPS = st.integers(1, 300)


def capacity_level(config, step, num_steps):
    return bisect_right(level_starts(config, num_steps), step) - 1


def capacities_at(config, final, step, num_steps):
    """Each layer's capacity at one step, counted from 0, without the stages."""
    return list(level_capacities(config, final, capacity_level(config, step, num_steps)))


@st.composite
def schedules(draw, names=CAPACITY_SCHEDULES):
    begin, end = sorted(draw(st.tuples(st.floats(0, 0.99), st.floats(0, 0.99))))
    levels = draw(st.integers(2, 12))
    return CapacityScheduleConfig(draw(st.sampled_from(names)), draw(SHARE), begin, end, levels)


def progress(config, step, num_steps):
    """How far the curve is from the start to the end, by its definition."""
    share = step / num_steps
    if config.name == "step" or config.begin == config.end:
        return float(share >= config.end)
    line = min(1.0, max(0.0, (share - config.begin) / (config.end - config.begin)))
    return line if config.name == "linear" else 0.5 - 0.5 * math.cos(math.pi * line)


@QUICK
@given(schedules(("linear", "cosine", "step")), STEPS)
def test_the_level_is_the_one_nearest_to_the_curve(config, num_steps):
    last = config.num_levels - 1
    for step in range(num_steps):
        wanted = progress(config, step, num_steps) * last
        level = capacity_level(config, step, num_steps)
        # On the edge between two levels rounding decides.
        assert abs(level - wanted) <= 0.5 + 1e-6 or math.isclose(step / num_steps, config.end)


@QUICK
@given(schedules(), FINAL, STEPS)
def test_capacities_go_from_the_start_to_the_final_ones_and_never_back(config, final, num_steps):
    actual = [capacities_at(config, final, step, num_steps) for step in range(num_steps)]
    for step, capacities in enumerate(actual):
        if step / num_steps >= config.end + 1e-9 or config.name == "constant":
            assert capacities == final
        elif step / num_steps < config.begin - 1e-9:
            assert capacities == [None if share is None else config.start for share in final]
    for layer, share in enumerate(final):
        values = [capacities[layer] for capacities in actual]
        if share is None:
            assert set(values) == {None}
        else:
            assert values == sorted(values, reverse=config.start > share)
            assert (
                min(config.start, share) <= min(values) <= max(values) <= max(config.start, share)
            )


@QUICK
@given(schedules(), FINAL, STEPS)
def test_the_stages_list_the_capacities_of_each_step(config, final, num_steps):
    stages = capacity_stages(config, final, num_steps)
    assert (stages[0].first, stages[-1].stop) == (0, num_steps)
    assert len(stages) <= config.num_levels
    for before, after in pairwise(stages):
        assert before.stop == after.first
        assert before.capacities != after.capacities
    for stage in stages:
        assert stage.num_steps == stage.stop - stage.first > 0
        for step in range(stage.first, stage.stop):
            assert list(stage.capacities) == capacities_at(config, final, step, num_steps)


def test_a_line_by_hand():
    config = CapacityScheduleConfig("linear", start=1.0, begin=0.2, end=0.6, levels=5)
    stages = capacity_stages(config, [None, 0.5, 0.8], 100)
    # The curve is halfway between two levels at 0.2 + 0.4 (n + 1/2) / 4 of the run.
    assert [(s.first, s.stop) for s in stages] == [(0, 25), (25, 35), (35, 45), (45, 55), (55, 100)]
    assert [s.capacities[1] for s in stages] == [1.0, 0.875, 0.75, 0.625, 0.5]
    assert [s.capacities[2] for s in stages] == pytest.approx([1.0, 0.95, 0.9, 0.85, 0.8])
    assert {s.capacities[0] for s in stages} == {None}


@pytest.mark.parametrize(("end", "first"), [(0.55, 55), (0.07, 7), (0.291, 30), (0.0, 0)])
def test_a_step_falls_on_the_first_step_after_the_share(end, first):
    config = CapacityScheduleConfig("step", end=end)
    levels = [capacity_level(config, step, 100) for step in range(100)]
    assert levels == [0] * first + [1] * (100 - first)


def test_a_capacity_that_does_not_change_makes_no_stage():
    config = CapacityScheduleConfig("linear", start=0.25)
    assert len(capacity_stages(config, [None, 0.25], 100)) == 1
    assert len(capacity_stages(config, [0.25, 0.5], 100)) == config.levels


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"name": "exponential"}, "name"),
        *(({"name": "linear", "start": value}, "start") for value in (0.0, 1.5, math.nan)),
        ({"name": "cosine", "begin": 0.6}, "begin"),
        ({"name": "cosine", "begin": -0.1}, "begin"),
        ({"name": "cosine", "end": 1.1}, "end"),
        ({"name": "linear", "levels": 1}, "levels"),
        ({"name": "step", "end": 1.0}, "end"),
        ({"name": "linear", "begin": 1.0, "end": 1.0}, "begin"),
    ],
)
def test_mistakes_are_reported_under_their_key(changes, key):
    (problem,) = CapacityScheduleConfig(**changes).problems("capacity_schedule")
    assert problem.key == f"capacity_schedule.{key}"


@pytest.mark.parametrize("start", [0.01, 1.0])
def test_a_capacity_may_fall_or_rise(start):
    assert CapacityScheduleConfig("cosine", start=start).problems("capacity_schedule") == []


def test_a_schedule_needs_a_routed_layer():
    dense = TrainConfig(name="x", model=ModelConfig(pattern="dense"))
    keys = [problem.key for problem in dense.problems()]
    assert "capacity_schedule.name" not in keys
    dense.capacity_schedule.name = "linear"
    (problem,) = (p for p in dense.problems() if p.key == "capacity_schedule.name")
    assert "pattern=dense" in problem.reason
    dense.model.pattern = "every"
    assert "capacity_schedule.name" not in [p.key for p in dense.problems()]


# Learning rates.


@given(
    st.sampled_from(SCHEDULES),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 400),
)
def test_factor_is_positive_and_never_above_one(name, warmup, decay, final, steps):
    config = ScheduleConfig(name, warmup, decay, final)
    factors = [lr_factor(config, step, steps) for step in range(steps)]
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    assert factors[0] > 0 or final == 0


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@given(steps=st.integers(20, 500), final=st.floats(0, 1))
def test_last_step_is_at_the_final_rate(name, steps, final):
    config = ScheduleConfig(name, warmup=0.1, decay=0.3, final=final)
    assert lr_factor(config, steps - 1, steps) == pytest.approx(final)


@given(st.sampled_from(["cosine", "linear", "wsd"]), st.integers(20, 300))
def test_rises_in_the_warmup_and_then_never_again(name, steps):
    config = ScheduleConfig(name, warmup=0.1, decay=0.3, final=0.1)
    factors = [lr_factor(config, step, steps) for step in range(steps)]
    top = max(1, round(0.1 * steps)) - 1
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top] == 1
    assert factors[top:] == sorted(factors[top:], reverse=True)


def test_wsd_is_flat_until_its_decay():
    config = ScheduleConfig("wsd", warmup=0.1, decay=0.2, final=0.0)
    assert {lr_factor(config, step, 100) for step in range(9, 80)} == {1.0}
    assert lr_factor(config, 80, 100) < 1


def test_cosine_is_halfway_down_in_the_middle_of_its_fall():
    config = ScheduleConfig("cosine", warmup=0.0, final=0.0)
    assert lr_factor(config, 50, 101) == pytest.approx(0.5)


@QUICK
@given(st.sampled_from(SCHEDULES), st.integers(1, 40), st.integers(1, 300), st.integers(1, 300))
def test_a_warm_up_in_steps_is_the_same_in_runs_of_any_length(name, warmup, one, other):
    config = ScheduleConfig(name, warmup_steps=warmup)
    for step in range(min(warmup, one, other)):
        rates = {lr_factor(config, step, steps) for steps in (one, other)}
        assert rates == {(step + 1) / warmup}


@QUICK
@given(st.integers(1, 40), st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_wsd_is_constant_until_its_decay_to_the_bit(warmup, num_steps, decay, final):
    wsd = ScheduleConfig("wsd", warmup_steps=warmup, decay=decay, final=final)
    constant = ScheduleConfig("constant", warmup_steps=warmup)
    start = decay_start(wsd, num_steps)
    for step in range(num_steps):
        rate = lr_factor(wsd, step, num_steps)
        if step < start:
            assert rate == lr_factor(constant, step, 10**6)
        else:
            assert rate <= 1
    if start < num_steps:
        assert lr_factor(wsd, num_steps - 1, num_steps) == pytest.approx(final)
