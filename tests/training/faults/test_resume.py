"""Runs that are stopped and resumed: to the bit on as many ranks, to rounding on others."""

import shutil

import pytest
import torch

from modtrain.inference.data_view.step_samples import samples_of
from modtrain.training.run_directory import RunDirectory
from tests.helpers.marks import slow, slow_but
from tests.helpers.ranks import RankFailedError, on_ranks, outcomes_on_ranks
from tests.helpers.runs import losses_of
from tests.helpers.saved import assert_same_bits, newest_tensors, newest_weights
from tests.training.faults.run_cases import (
    EXPERTS,
    overrides,
    run,
    run_drawing,
    run_stopped_in_setup,
    samples_by_step,
)

STEPS = 6
STRATEGIES = {
    "ddp": (),
    "fsdp": (),
    "hsdp": ("strategy.shard_size=1",),
    "fsdp_tp": (),
    "fsdp_ep": EXPERTS,
    "fsdp_cp": (),
    "deepspeed_1": (),
    "deepspeed_2": ("strategy.offload=true",),
    "deepspeed_3": (),
}
QUICK = ("ddp", "fsdp")
GROUPS = {"hsdp": "shard_size", "fsdp_tp": "tensor_parallel", "fsdp_cp": "context_parallel"}


@pytest.mark.slow
@pytest.mark.on_commit(3)
@pytest.mark.parametrize("strategy", slow_but(QUICK, STRATEGIES))
def test_a_stopped_run_resumes_to_the_same_bits(prepared, tmp_path, strategy):
    # The stop is between two records: the next one is of the steps before it, too.
    more = (f"strategy={strategy}", "log.every=2", *STRATEGIES[strategy])
    whole = overrides(prepared, tmp_path, "whole", STEPS, *more)
    assert on_ranks(run, 2, whole, joins=False) == ["complete"] * 2
    stopped = overrides(prepared, tmp_path, "cut", STEPS, *more)
    # The request comes to one rank alone; all save and stop.
    assert on_ranks(run, 2, stopped, None, (2, 1), joins=False) == ["stopped"] * 2
    assert on_ranks(run, 2, stopped, joins=False) == ["complete"] * 2
    assert_same_bits(*(newest_tensors(tmp_path / name, STEPS) for name in ("whole", "cut")))
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "cut")


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [0, slow(1)])
def test_a_signal_to_one_rank_in_the_setup_stops_all(prepared, tmp_path, rank):
    lines = overrides(prepared, tmp_path, "told", STEPS, "strategy=ddp")
    assert on_ranks(run_stopped_in_setup, 2, lines, rank, joins=False) == ["stopped"] * 2
    assert on_ranks(run, 2, lines, joins=False) == ["complete"] * 2


@pytest.mark.slow
def test_ranks_that_come_to_read_the_same_samples_draw_the_same(prepared, tmp_path):
    """Two data-parallel ranks had states of their own, which are of no use to parts of one."""
    lines = overrides(prepared, tmp_path, "drawn", STEPS, "model.router.score=random")
    on_ranks(run, 2, [*lines, "strategy=ddp"], None, (2, 0), joins=False)
    sliced = [*lines, "strategy=fsdp_cp", "strategy.context_parallel=2"]
    one, other = on_ranks(run_drawing, 2, sliced, joins=False)
    assert one == other
    assert one


# One run through many hands: (ranks, strategy) of each stretch of steps.
JOURNEYS = {
    "1-2-4": [(1, "single"), (2, "ddp"), (4, "ddp")],
    "4-2-1": [(4, "fsdp"), (2, "fsdp"), (1, "fsdp")],
    "through strategies": [(2, "ddp"), (4, "fsdp"), (2, "fsdp_tp"), (1, "single")],
    "and back": [(4, "fsdp_tp"), (2, "fsdp"), (4, "hsdp"), (1, "ddp")],
    "through a cut sequence": [(4, "fsdp_cp"), (2, "ddp"), (2, "fsdp_cp")],
    "by way of DeepSpeed": [(2, "deepspeed_3"), (1, "fsdp"), (2, "deepspeed_1"), (4, "ddp")],
}


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize("journey", slow_but(("1-2-4", "through strategies"), JOURNEYS))
def test_other_ranks_and_strategies_resume_with_the_same_samples(prepared, tmp_path, journey):
    """The sample numbers of every step are noted on each rank, by what was trained on."""
    stretches, per_stretch = JOURNEYS[journey], 2
    steps = per_stretch * len(stretches)
    for name in ("alone", "journey"):
        (tmp_path / name).mkdir()
    alone = overrides(prepared, tmp_path, "alone", steps, "log.every=4")
    on_ranks(run, 1, alone, str(tmp_path / "alone"), joins=False)
    for number, (ranks, strategy) in enumerate(stretches):
        more = ["log.every=4", f"strategy={strategy}"]
        if strategy in GROUPS:
            more.append(f"strategy.{GROUPS[strategy]}=2")
        lines = overrides(prepared, tmp_path, "journey", steps, *more)
        last = number + 1 == len(stretches)
        # On several ranks the stop is agreed on a step later than it came.
        at = per_stretch * (number + 1) - (2 if ranks > 1 else 1)
        stop = None if last else (at, 0)
        status = on_ranks(run, ranks, lines, str(tmp_path / "journey"), stop, joins=False)
        assert status == ["complete" if last else "stopped"] * ranks
    expected, actual = (samples_by_step(tmp_path / name) for name in ("alone", "journey"))
    assert list(actual) == list(range(steps))
    assert actual == expected
    # As `modtrain data` lists them, whatever ranks trained the step.
    directory = RunDirectory(tmp_path / "journey")
    assert actual == {
        step: [sample.number for sample in samples_of(directory, step + 1)] for step in actual
    }
    one, other = losses_of(tmp_path / "alone"), losses_of(tmp_path / "journey")
    assert one.keys() == other.keys()
    assert max(abs(one[step] - other[step]) for step in one) < 1e-5
    ours, theirs = newest_weights(tmp_path / "alone"), newest_weights(tmp_path / "journey")
    assert ours.keys() == theirs.keys()
    for key, weight in ours.items():
        torch.testing.assert_close(weight, theirs[key], rtol=0, atol=2e-5, msg=key)


@pytest.mark.nightly
@pytest.mark.parametrize("strategy", QUICK)
def test_lost_checkpoints_stop_all_ranks_until_a_start_is_to_be_fresh(prepared, tmp_path, strategy):
    lines = overrides(prepared, tmp_path, "cut", STEPS, f"strategy={strategy}")
    assert on_ranks(run, 2, lines, None, (2, 1), joins=False) == ["stopped"] * 2
    shutil.rmtree(tmp_path / "cut/checkpoints")
    for outcome in outcomes_on_ranks(run, 2, lines, joins=False):
        assert isinstance(outcome, RankFailedError) and "add resume=fresh" in outcome.message
    again = [*lines, "resume=fresh"]
    assert on_ranks(run, 2, again, joins=False) == ["complete"] * 2
    assert (tmp_path / "cut/before-1/metrics.jsonl").is_file()
    assert list(losses_of(tmp_path / "cut")) == list(range(1, STEPS + 1))
