import pytest
from hypothesis import given
from hypothesis import strategies as st

from modtrain.training.config import SCHEDULES, ScheduleConfig
from modtrain.training.schedules import lr_factor

SHARE = st.floats(0, 1)


@given(st.sampled_from(SCHEDULES), SHARE, SHARE, SHARE, st.integers(1, 400))
def test_factor_is_positive_and_never_above_one(name, warmup, decay, final, steps):
    config = ScheduleConfig(name, warmup, decay, final)
    factors = [lr_factor(config, step, steps) for step in range(steps)]
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    assert factors[0] > 0 or final == 0


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@given(steps=st.integers(20, 500), final=SHARE)
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
