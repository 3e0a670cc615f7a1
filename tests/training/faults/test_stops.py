"""Whole runs that end at a spike or a NaN: what they say, keep, and can do next."""

import math

import pytest

from modtrain.checkpoint.recovery import whole_checkpoints
from tests.helpers import runs
from tests.helpers.marks import slow
from tests.helpers.ranks import RankFailedError, on_ranks, outcomes_on_ranks
from tests.helpers.spiked_runs import (
    BAD,
    NAN,
    events,
    numbers_of,
    overrides,
    records,
    scale_loss,
    spiked,
)

STOPS = {
    ("none", NAN): f"the loss or its gradient is NaN or infinite at step {BAD} on rank 1;",
    ("stop", NAN): f"step {BAD} is a spike: loss nan (limit ",
    ("stop", 1e3): f"step {BAD} is a spike: loss ",
}


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize(
    ("strategy", "action", "factor"),
    [
        ("deepspeed_1", "none", NAN),
        *(
            slow(f"deepspeed_{stage}", *case)
            for stage in (1, 2, 3)
            for case in STOPS
            if (stage, *case) != (1, "none", NAN)
        ),
    ],
)
def test_deepspeed_stops(prepared, tmp_path, strategy, action, factor):
    # DeepSpeed leaves out a NaN's step at once, and nothing is due at it.
    more = ("log.every=4", "checkpoint.every=5") if math.isnan(factor) else ()
    lines = overrides(prepared, tmp_path, "run", strategy, f"spike={action}", *more)
    bad = numbers_of(prepared, BAD)
    for outcome in outcomes_on_ranks(spiked, 2, lines, bad, factor, 1, joins=False):
        assert isinstance(outcome, RankFailedError) and outcome.kind == "DivergedError"
        assert STOPS[action, factor] in outcome.message
        assert " on rank 1;" in outcome.message or not math.isnan(factor)
        assert f"its samples are {', '.join(map(str, bad))};" in outcome.message
        assert f"checkpoints/step-{5 if more else 6:09d}" in outcome.message
        assert "strategy=fsdp spike=skip" in outcome.message
    run = tmp_path / "run"
    saved = whole_checkpoints(run / "checkpoints")
    assert [step for step, _ in saved] == [5 if more else 6]
    assert max(records(run, "loss")) < BAD
    if action == "stop":
        (event,) = events(run)
        assert (event["action"], event["step"], event["samples"]) == ("stop", BAD, bad)


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize(
    ("strategy", "remedy"),
    [
        ("single", ["spike=skip"]),
        slow("single", ["spike=roll_back"]),
        slow("fsdp", ["spike=skip"]),
        slow("deepspeed_1", ["strategy=fsdp", "spike=skip"]),
        slow("deepspeed_3", ["strategy=fsdp", "spike=roll_back"]),
    ],
)
def test_what_a_nan_names_as_its_remedy_can_be_done(prepared, tmp_path, strategy, remedy):
    world_size = 1 if strategy == "single" else 2
    lines = overrides(prepared, tmp_path, "run", strategy)
    bad = numbers_of(prepared, BAD)[:1]
    for outcome in outcomes_on_ranks(spiked, world_size, lines, bad, NAN, joins=False):
        assert isinstance(outcome, RankFailedError)
        assert f"with {' '.join(remedy)}, which" in outcome.message
    again = [line for line in lines if not line.startswith("strategy=") or len(remedy) == 1]
    outcome = on_ranks(spiked, world_size, [*again, *remedy], bad, NAN, joins=False)
    assert [status for status, *_ in outcome] == ["complete"] * world_size
    assert [(e["action"], e["step"]) for e in events(tmp_path / "run")] == [
        (remedy[-1].removeprefix("spike="), BAD)
    ]


@pytest.mark.slow
def test_what_another_run_needs_is_another_name(prepared, tmp_path):
    lines = overrides(prepared, tmp_path, "run", "single", "spike=stop")
    bad = numbers_of(prepared, BAD)[:1]
    (outcome,) = outcomes_on_ranks(spiked, 1, lines, bad, joins=False)
    assert "With another optimizer.lr or optimizer.grad_clip it is another run" in outcome.message
    lower = [*lines, "optimizer.lr=1e-4"]
    (outcome,) = outcomes_on_ranks(spiked, 1, lower, bad, joins=False)
    assert outcome.kind == "OtherRunError"


@pytest.mark.slow
def test_too_many_skips_in_a_row_stop_the_run(prepared, tmp_path):
    more = ("spike=skip", "spike.max_in_a_row=2", "checkpoint.every=1", "checkpoint.keep_last=9")
    lines = overrides(prepared, tmp_path, "run", "single", *more)
    bad = [numbers_of(prepared, step)[0] for step in (4, 6, 7, 8)]
    (outcome,) = outcomes_on_ranks(spiked, 1, lines, bad, joins=False)
    assert isinstance(outcome, RankFailedError) and outcome.kind == "DivergedError"
    assert "step 8 is a spike" in outcome.message
    assert "after 2 skipped in a row" in outcome.message
    # Those saved at the skipped steps have the same weights as what may have ruined the run.
    assert "the last good checkpoint is" in outcome.message
    assert "checkpoints/step-000000005.\nLater ones, up to step-000000007" in outcome.message
    assert [(e["action"], e["step"]) for e in events(tmp_path / "run")] == [
        *(("skip", 4), ("skip", 6), ("skip", 7), ("stop", 8))
    ]


@pytest.mark.parametrize(("strategy", "world_size"), [("single", 1), ("ddp", 2), slow("fsdp", 2)])
def test_a_stop_names_step_figures_samples_and_remedy(prepared, tmp_path, strategy, world_size):
    # Nothing is due at the spike: it is found later, and nothing was learnt or saved after it.
    more = ("spike=stop", "log.every=4", "checkpoint.every=5")
    lines = overrides(prepared, tmp_path, "run", strategy, *more)
    bad = numbers_of(prepared, BAD)
    for outcome in outcomes_on_ranks(spiked, world_size, lines, bad[-1:], joins=False):
        assert isinstance(outcome, RankFailedError) and outcome.kind == "DivergedError"
        assert f"step {BAD} is a spike: loss " in outcome.message
        assert "(limit " in outcome.message and "gradient norm" in outcome.message
        assert f"its samples are {', '.join(map(str, bad))};" in outcome.message
        assert "checkpoints/step-000000005" in outcome.message
    run = tmp_path / "run"
    assert [step for step, _ in whole_checkpoints(run / "checkpoints")] == [5]
    assert list(records(run, "loss")) == [4]
    assert [(e["action"], e["step"]) for e in events(run)] == [("stop", BAD)]


def spiked_and_signalled(lines: list[str], bad: list[int]) -> str:
    scale_loss(bad, 1e3)
    runs.before_step(BAD - 1, runs.request_stop)
    return runs.run(lines)


def test_a_signal_saves_no_spike_that_was_not_checked(prepared, tmp_path):
    lines = overrides(prepared, tmp_path, "run", "single", "spike=stop", "log.every=100")
    bad = numbers_of(prepared, BAD)[:1]
    (outcome,) = outcomes_on_ranks(spiked_and_signalled, 1, lines, bad, joins=False)
    assert isinstance(outcome, RankFailedError) and outcome.kind == "DivergedError"
    assert f"step {BAD} is a spike" in outcome.message
    saved = whole_checkpoints(tmp_path / "run/checkpoints")
    assert [step for step, _ in saved] == [6]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [slow("ddp"), "fsdp"])
def test_a_nan_names_the_rank_where_it_began(prepared, tmp_path, strategy):
    # In the warm-up, in which nothing else is judged.
    lines = overrides(prepared, tmp_path, "run", strategy, "spike=stop", "spike.warmup=50")
    bad = numbers_of(prepared, BAD)
    for outcome in outcomes_on_ranks(spiked, 2, lines, bad, NAN, 1, joins=False):
        assert isinstance(outcome, RankFailedError) and outcome.kind == "DivergedError"
        assert f"step {BAD} is a spike: loss nan, gradient norm nan on rank 1;" in outcome.message
