import json
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modtrain.common.errors import ConfigError, DataError
from modtrain.data.config import DataConfig
from modtrain.models.config import ModelConfig
from modtrain.models.flops import training_flops_per_token
from modtrain.training.config import BatchConfig, BudgetConfig, PlanConfig, TrainConfig
from modtrain.training.plan import derive, resolve
from modtrain.training.plan_report import show
from modtrain.training.schedule_config import CAPACITY_SCHEDULES, CapacityScheduleConfig
from tests.helpers.problems import problems_of
from tests.training.test_schedules import capacities_at

QUICK = settings(max_examples=50, deadline=None, derandomize=True)
MODEL = ModelConfig(d_model=32, num_layers=4, num_heads=2, vocab_size=300)


def config(**changes):
    base = TrainConfig(
        name="x",
        model=MODEL,
        data=DataConfig(path="nowhere", seq_len=64),
        batch=BatchConfig(tokens=512, micro_batch_size=2),
    )
    return replace(base, **changes)


@pytest.mark.parametrize("parts", [("model", "strategy"), ("budget", "capacity_schedule")])
def test_each_part_is_checked_once(parts, monkeypatch):
    checked = []
    run = config(capacity_schedule=CapacityScheduleConfig("linear"), budget=BudgetConfig(steps=40))

    def count(part, original):
        return lambda self, *arguments: (checked.append(part), original(self, *arguments))[1]

    for part in parts:
        kind = type(getattr(run, part))
        monkeypatch.setattr(kind, "problems", count(part, kind.problems))
    resolve(run, needs_data=False)
    assert sorted(checked) == sorted(parts)


@st.composite
def scheduled(draw):
    """A run of few steps whose capacities fall, rise or both."""
    begin, end = sorted(draw(st.tuples(st.floats(0, 0.9), st.floats(0, 0.9))))
    name = draw(st.sampled_from(CAPACITY_SCHEDULES))
    start, levels = draw(st.sampled_from([0.05, 0.4, 1.0])), draw(st.integers(2, 9))
    pattern = draw(st.sampled_from(["every_other", "cosine", "u_shape", [0.1, 0.9, 1, 0.5]]))
    return config(
        model=replace(MODEL, pattern=pattern, capacity=draw(st.sampled_from([0.1, 0.5]))),
        capacity_schedule=CapacityScheduleConfig(name, start, begin, end, levels),
    )


@QUICK
@given(scheduled(), st.integers(12, 150))
def test_the_whole_is_the_sum_of_the_steps(run, steps):
    plan = derive(replace(run, budget=BudgetConfig(steps=steps)))
    each = [
        512 * training_flops_per_token(run.model, 64, capacities)
        for step in range(steps)
        for capacities in [capacities_at(run.capacity_schedule, run.model.capacities, step, steps)]
    ]
    for step in (0, steps // 3, steps - 1):
        wanted = capacities_at(run.capacity_schedule, run.model.capacities, step, steps)
        assert list(plan.capacities_at(step)) == wanted
    until = [plan.flops_until(step) for step in range(steps + 1)]
    assert until == pytest.approx(list(accumulate(each, initial=0.0)))
    assert plan.flops == until[-1]
    assert plan.flops_per_token * plan.tokens == pytest.approx(plan.flops)
    assert (plan.steps, plan.tokens) == (steps, 512 * steps)


@QUICK
@given(scheduled(), st.floats(60, 400))
def test_under_a_schedule_a_budget_is_met_by_the_nearest_whole_number_of_steps(run, size):
    budget = size * 512 * training_flops_per_token(run.model, 64)
    plan = derive(replace(run, budget=BudgetConfig(flops=budget)))
    near = range(max(1, plan.steps - 4), plan.steps + 5)
    totals = [derive(replace(run, budget=BudgetConfig(steps=steps))).flops for steps in near]
    assert all(before < after for before, after in pairwise(totals))
    assert abs(plan.flops - budget) == min(abs(total - budget) for total in totals)
    assert plan.flops in totals


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [(("step", 1.0, 0.0, 0.95), 10), (("linear", 1.0, 0.0, 1.0), 10), (("cosine",), 1)],
    ids=str,
)
def test_a_schedule_that_does_not_reach_its_end_is_reported(schedule, steps):
    run = config(
        capacity_schedule=CapacityScheduleConfig(*schedule), budget=BudgetConfig(steps=steps)
    )
    with pytest.raises(ConfigError, match="model's own capacities"):
        derive(run)


@pytest.mark.parametrize("step", [-1, 4, 5])
def test_a_step_that_the_run_does_not_have_is_refused(step):
    plan = derive(config(budget=BudgetConfig(steps=4)))
    with pytest.raises(ValueError, match=str(step)):
        plan.capacities_at(step)
    if step != 4:
        with pytest.raises(ValueError, match=str(step)):
            plan.flops_until(step)


@given(st.integers(1, 10**6))
def test_a_budget_of_flops_is_met_by_the_nearest_step(steps):
    per_step = training_flops_per_token(MODEL, 64) * 512
    for share in (-0.4, 0.0, 0.4):
        plan = derive(config(budget=BudgetConfig(flops=per_step * (steps + share))))
        assert plan.steps == max(1, steps) or steps + share < 1
        assert abs(plan.flops - per_step * (steps + share)) <= per_step / 2 * (1 + 1e-9)


@given(st.integers(1, 10**6))
def test_budgets_in_tokens_and_steps_agree(steps):
    by_steps = derive(config(budget=BudgetConfig(steps=steps)))
    by_tokens = derive(config(budget=BudgetConfig(tokens=by_steps.tokens)))
    by_flops = derive(config(budget=BudgetConfig(flops=by_steps.flops)))
    assert by_steps == by_tokens == by_flops


def test_a_budget_below_one_step_names_what_a_step_takes():
    with pytest.raises(ConfigError, match="is less than one step"):
        derive(config(budget=BudgetConfig(flops=1.0)))


def test_sizes_follow_from_the_data(prepared):
    resolved, plan = resolve(
        config(
            data=DataConfig(path=str(prepared)),
            model=replace(MODEL, vocab_size=None),
            budget=BudgetConfig(steps=3),
        )
    )
    assert (resolved.model.vocab_size, resolved.data.seq_len) == (300, 64)
    assert (plan.sequences_per_step, plan.accumulate, plan.tokens) == (8, 4, 3 * 512)


def test_shorter_sequences_divide_the_shards(prepared):
    short = config(data=DataConfig(path=str(prepared), seq_len=32), budget=BudgetConfig(steps=3))
    assert resolve(short)[1].seq_len == 32


@pytest.mark.parametrize("length", [48, 65, 128])
def test_other_lengths_are_refused_with_both_numbers(prepared, length):
    wrong = config(data=DataConfig(path=str(prepared), seq_len=length))
    problem = problems_of(resolve, wrong)["data.seq_len"]
    assert problem.value == length
    assert "64" in problem.reason


def test_a_vocabulary_below_the_tokenizers_is_refused(prepared):
    wrong = config(
        data=DataConfig(path=str(prepared)),
        model=replace(MODEL, vocab_size=299),
        budget=BudgetConfig(steps=1),
    )
    with pytest.raises(ConfigError, match="smaller than the tokenizer's 300"):
        resolve(wrong)


def test_a_batch_that_does_not_divide_names_a_size_that_does(prepared):
    wrong = config(
        data=DataConfig(path=str(prepared)),
        batch=BatchConfig(tokens=500, micro_batch_size=2),
        budget=BudgetConfig(steps=1),
    )
    with pytest.raises(ConfigError, match="use 512"):
        resolve(wrong)


def test_planning_needs_no_data_where_the_configuration_is_enough():
    assert resolve(config(budget=BudgetConfig(steps=2)), needs_data=False)[1].steps == 2
    problems = problems_of(resolve, TrainConfig(data=DataConfig(path="nowhere")), needs_data=False)
    assert {"model.vocab_size", "data.seq_len", "budget"} <= problems.keys()


def test_training_without_data_names_the_prepare_command():
    with pytest.raises((DataError, ConfigError), match="prepare"):
        resolve(config(budget=BudgetConfig(steps=2)))


@pytest.mark.parametrize(
    ("model", "schedule", "key", "layers"),
    [
        ({"capacity": 0.005}, {}, "model.capacity", "1, 3"),
        ({"capacity": 0.005, "pattern": "ramp_down"}, {}, "model.capacity", "3"),
        ({"pattern": [1, 0.5, 0.5, 0.001]}, {}, "model.pattern", "3"),
        ({}, {"name": "linear", "start": 0.005}, "capacity_schedule.start", "1, 3"),
    ],
)
def test_a_capacity_of_no_token_names_layers_and_k(model, schedule, key, layers):
    run = config(
        model=replace(MODEL, **model),
        capacity_schedule=CapacityScheduleConfig(**schedule),
        budget=BudgetConfig(steps=2),
    )
    problem = problems_of(resolve, run, needs_data=False)[key]
    assert f" {layers} " in problem.reason
    assert "= 0" in problem.reason
    assert "0.016" in problem.remedy


@pytest.mark.parametrize("schedule", [{}, {"name": "constant", "start": 0.005}])
def test_what_rounds_to_one_token_is_enough_and_an_unused_start_is_not_checked(schedule):
    run = config(
        model=replace(MODEL, capacity=0.6 / 64),
        capacity_schedule=CapacityScheduleConfig(**schedule),
        budget=BudgetConfig(steps=2),
    )
    assert resolve(run, needs_data=False)[1].steps == 2


def test_the_token_that_ends_documents_comes_with_the_mask_alone(prepared):
    eos_id = json.loads((prepared / "index.json").read_text())["eos_id"]
    plain = config(data=DataConfig(path=str(prepared)), budget=BudgetConfig(steps=2))
    assert resolve(plain)[0].data.eos_id is None
    masked = replace(plain, data=replace(plain.data, document_mask=True))
    resolved, plan = resolve(masked)
    assert resolved.data.eos_id == eos_id
    # What is resolved stays as it is.
    assert resolve(resolved) == (resolved, plan)


def test_a_mask_without_shards_names_the_source_of_the_end_token():
    run = config(
        data=DataConfig(path="nowhere", seq_len=64, document_mask=True),
        budget=BudgetConfig(steps=2),
    )
    assert "prepare" in problems_of(resolve, run, needs_data=False)["data.eos_id"].remedy
    known = replace(run, data=replace(run.data, eos_id=0))
    assert resolve(known, needs_data=False)[0].data.eos_id == 0


def test_the_report_shows_the_stages(capsys):
    run = config(
        budget=BudgetConfig(steps=100),
        capacity_schedule=CapacityScheduleConfig("step", start=0.5, end=0.25),
    )
    show(PlanConfig(**vars(run)))
    output = capsys.readouterr().out
    assert "1 to 25" in output
    assert "26 to 100" in output
    plan = resolve(run, needs_data=False)[1]
    assert f"{plan.flops_until(25) / plan.flops:.1%}" in output
    assert f"{1 - plan.flops_until(25) / plan.flops:.1%}" in output
    show(PlanConfig(**vars(replace(run, capacity_schedule=CapacityScheduleConfig()))))
    assert "schedule of capacities" not in capsys.readouterr().out
