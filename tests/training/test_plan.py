from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modtrain.data.config import DataConfig
from modtrain.errors import ConfigError, DataError
from modtrain.models.config import ModelConfig
from modtrain.models.flops import training_flops_per_token
from modtrain.training.config import BatchConfig, BudgetConfig, TrainConfig
from modtrain.training.plan import derive, resolve

MODEL = ModelConfig(d_model=32, num_layers=4, num_heads=2, vocab_size=300)


def config(**changes):
    base = TrainConfig(
        name="x",
        model=MODEL,
        data=DataConfig(path="nowhere", seq_len=64),
        batch=BatchConfig(tokens=512, micro_batch_size=2),
    )
    return replace(base, **changes)


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


def test_equal_flops_give_a_routed_model_more_steps():
    budget = BudgetConfig(flops=1e12)
    routed, dense = (
        derive(config(budget=budget, model=replace(MODEL, pattern=pattern)))
        for pattern in ("every_other", "dense")
    )
    assert routed.steps > dense.steps
    assert routed.flops == pytest.approx(dense.flops, rel=1e-2)


def test_a_budget_below_one_step_says_what_a_step_takes():
    with pytest.raises(ConfigError, match="does not pay for one step"):
        derive(config(budget=BudgetConfig(flops=1.0)))


def test_sizes_follow_from_the_data(prepared):
    found, plan = resolve(
        config(
            data=DataConfig(path=str(prepared)),
            model=replace(MODEL, vocab_size=None),
            budget=BudgetConfig(steps=3),
        )
    )
    assert (found.model.vocab_size, found.data.seq_len) == (300, 64)
    assert (plan.sequences_per_step, plan.accumulate, plan.tokens) == (8, 4, 3 * 512)


def test_shorter_sequences_divide_the_shards(prepared):
    short = config(data=DataConfig(path=str(prepared), seq_len=32), budget=BudgetConfig(steps=3))
    assert resolve(short)[1].seq_len == 32


@pytest.mark.parametrize("length", [48, 65, 128])
def test_other_lengths_are_refused_with_both_numbers(prepared, length):
    wrong = config(data=DataConfig(path=str(prepared), seq_len=length))
    with pytest.raises(ConfigError) as error:
        resolve(wrong)
    (problem,) = (p for p in error.value.problems if p.key == "data.seq_len")
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


def test_planning_needs_no_data_where_the_configuration_says_enough():
    assert resolve(config(budget=BudgetConfig(steps=2)), needs_data=False)[1].steps == 2
    with pytest.raises(ConfigError) as error:
        resolve(TrainConfig(data=DataConfig(path="nowhere")), needs_data=False)
    assert {"model.vocab_size", "data.seq_len", "budget"} <= {p.key for p in error.value.problems}


def test_training_without_data_says_to_prepare_it():
    with pytest.raises((DataError, ConfigError), match="prepare"):
        resolve(config(budget=BudgetConfig(steps=2)))
