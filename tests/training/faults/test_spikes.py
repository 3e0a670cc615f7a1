"""Whole runs with a spike in their data: stopped, skipped or rolled back, alike on every rank."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from modtrain.training import run as run_module
from modtrain.training.spikes.journal import SpikeJournal
from tests.helpers import runs
from tests.helpers.marks import slow
from tests.helpers.ranks import RankFailedError, on_ranks, outcomes_on_ranks
from tests.helpers.saved import assert_same_bits, newest_tensors, tensors_of
from tests.helpers.spiked_runs import (
    BAD,
    NAN,
    SEQUENCES,
    STEPS,
    events,
    numbers_of,
    overrides,
    records,
    rest_of,
    scale_loss,
    spiked,
)

WORLDS = [("single", 1), slow("ddp", 2), ("fsdp", 2)]


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize(("strategy", "world_size"), WORLDS)
@pytest.mark.parametrize("factor", [1e3, slow(NAN)])
def test_a_skipped_step_changes_no_bit(prepared, tmp_path, strategy, world_size, factor):
    lines = overrides(prepared, tmp_path, "run", strategy, "spike=skip")
    bad = numbers_of(prepared, BAD)
    outcomes = on_ranks(spiked, world_size, lines, bad[:1], factor, joins=False)
    for status, changed, judge in outcomes:
        assert status == "complete"
        # All ranks go by the same figures, though each has seen other samples.
        assert judge == outcomes[0][2]
        # Padding and buffers aside, a step that is made changes all.
        assert [step for step, what in enumerate(changed, 1) if what == "none"] == [BAD]
    run = tmp_path / "run"
    (event,) = events(run)
    assert (event["action"], event["step"], event["samples"]) == ("skip", BAD, bad)
    assert (event["loss"] == "nan") if math.isnan(factor) else event["loss"] > event["loss_limit"]
    assert records(run, "spike/skipped") == {
        step: float(step >= BAD) for step in range(1, STEPS + 1)
    }
    losses = records(run, "loss")
    assert {*range(1, STEPS + 1)} - losses.keys() == {BAD}
    assert all(loss < 7 for step, loss in losses.items() if step != BAD)
    assert records(run, "lr")[STEPS] < records(run, "lr")[BAD]
    assert rest_of(run, STEPS)["progress"]["samples"] == STEPS * SEQUENCES


@pytest.mark.nightly
def test_a_record_is_the_mean_over_the_steps_taken(prepared, tmp_path):
    """Also where a step is left out, and forgotten at a save, that was the first since a record."""
    bad = numbers_of(prepared, BAD)[:1]
    windows = {1: (), 9: (range(1, 10),), 6: (range(1, 7), range(7, 10))}
    for every in windows:
        more = ("spike=skip", f"log.every={every}", f"checkpoint.every={BAD}")
        lines = overrides(prepared, tmp_path, f"every_{every}", "single", *more)
        on_ranks(spiked, 1, lines, bad, NAN, joins=False)
    for key in ("loss", "predictor_loss"):
        single = records(tmp_path / "every_1", key)
        for every in (6, 9):
            assert records(tmp_path / f"every_{every}", key) == {
                steps[-1]: pytest.approx(np.mean([single[s] for s in steps if s != BAD]))
                for steps in windows[every]
            }
    norms = [records(tmp_path / f"every_{every}", "grad_norm") for every in (1, 9)]
    assert norms[0][9] == norms[1][9]


EXPERTS = ["model.experts.count=4", "model.experts.dim=8", "model.experts.balance=bias"]
OTHERS = {
    "fsdp_ep": EXPERTS,
    "fsdp_tp": ["strategy.tensor_parallel=2"],
    "hsdp": ["strategy.shard_size=1"],
    "fsdp": [*EXPERTS, "precision=bf16", "strategy.activation_checkpointing=full"],
}


@pytest.mark.on_commit(2)
@pytest.mark.slow
@pytest.mark.parametrize("strategy", OTHERS)
@pytest.mark.parametrize("factor", [1e3, NAN])
def test_every_strategy_skips_the_step(prepared, tmp_path, strategy, factor):
    lines = overrides(prepared, tmp_path, "run", strategy, "spike=skip", *OTHERS[strategy])
    bad = numbers_of(prepared, BAD)[:1]
    for _, changed, _ in on_ranks(spiked, 2, lines, bad, factor, joins=False):
        assert [step for step, what in enumerate(changed, 1) if what == "none"] == [BAD]


def killed_at(lines: list[str], bad: list[int], step: int) -> str:
    scale_loss(bad, 1e3)
    runs.before_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return runs.run(lines)


# Killed before the skip's checkpoint, so that the skip comes again, and after it.
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("strategy", "world_size", "kills"), [("single", 1, [BAD]), slow("fsdp", 2, [BAD, 8])]
)
def test_a_run_killed_after_a_skip_detects_the_same_spikes(
    prepared, tmp_path, strategy, world_size, kills
):
    bad = numbers_of(prepared, BAD)[:1]
    more = ("spike=skip", "spike.window=4", "checkpoint.every=4")
    whole, killed = (
        overrides(prepared, tmp_path, name, strategy, *more) for name in ("whole", "cut")
    )
    on_ranks(spiked, world_size, whole, bad, joins=False)
    for step in kills:
        outcomes = outcomes_on_ranks(killed_at, world_size, killed, bad, step, joins=False)
        assert all(isinstance(outcome, RankFailedError) for outcome in outcomes)
    on_ranks(spiked, world_size, killed, bad, joins=False)
    whole, killed = tmp_path / "whole", tmp_path / "cut"
    assert_same_bits(newest_tensors(whole, STEPS), newest_tensors(killed, STEPS))
    for step in (8, STEPS):
        assert_same_bits(rest_of(whole, step)["spikes"], rest_of(killed, step)["spikes"])
    for key in ("loss", "spike/loss", "spike/loss_limit", "spike/skipped"):
        one, other = records(whole, key), records(killed, key)
        assert str(one) == str(other)
    assert [e["step"] for e in events(killed)] == [BAD]


def left_out(run: Path, *stretches: tuple[int, int]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    content = {"left_out": stretches, "rollbacks": len(stretches)}
    (run / "left_out.json").write_text(json.dumps(content))


def assert_same_run(one: Path, other: Path) -> None:
    assert_same_bits(newest_tensors(one, STEPS), newest_tensors(other, STEPS))
    assert_same_bits(rest_of(one, STEPS)["spikes"], rest_of(other, STEPS)["spikes"])
    assert rest_of(one, STEPS)["progress"] == rest_of(other, STEPS)["progress"]
    for key in ("loss", "grad_norm", "lr"):
        assert records(one, key) == records(other, key) != {}


@pytest.mark.slow
@pytest.mark.on_commit(2)
@pytest.mark.parametrize(("strategy", "world_size"), WORLDS)
@pytest.mark.parametrize(
    ("more", "first"),
    [
        # From the checkpoint after step 6; of two steps.
        ([], 6),
        slow(["checkpoint.every=5", "spike.rollback_steps=1"], 6),
        slow(["checkpoint.every=5"], 5),
        # No checkpoint yet: from the start.
        slow(["checkpoint.every=8"], 0),
        slow(["spike.rollback_steps=5", "checkpoint.background=true", "log.every=3"], 6),
    ],
)
def test_rolled_back_it_has_no_such_samples(prepared, tmp_path, strategy, world_size, more, first):
    bad = numbers_of(prepared, BAD)
    stretch = (first * SEQUENCES, BAD * SEQUENCES)
    left_out(tmp_path / "without", stretch)
    for name in ("without", "run"):
        lines = overrides(prepared, tmp_path, name, strategy, "spike=roll_back", *more)
        outcomes = on_ranks(spiked, world_size, lines, bad[1:2], joins=False)
        assert [status for status, *_ in outcomes] == ["complete"] * world_size
    run = tmp_path / "run"
    assert_same_run(tmp_path / "without", run)
    progress = rest_of(run, STEPS)["progress"]
    assert progress["samples"] == (STEPS + BAD - first) * SEQUENCES
    assert progress["tokens"] == STEPS * SEQUENCES * 64
    if "log.every=3" not in more:
        assert list(records(run, "loss")) == list(range(1, STEPS + 1))
    (event,) = events(run)
    assert (event["action"], event["step"], event["samples"]) == ("roll_back", BAD, bad)
    assert tuple(event["left_out"]) == stretch
    assert records(run, "spike/rollbacks")[STEPS] == 1
    assert json.loads((run / "left_out.json").read_text())["left_out"] == [list(stretch)]
    if not more:
        # The last record of the step that it went back to.
        assert [records(run, "spike/rollbacks")[step] for step in (5, 6, 7)] == [0, 1, 1]


def killed_in_a_roll_back(lines: list[str], bad: list[int], written: bool) -> str:
    scale_loss(bad, 1e3)
    if written:
        original = run_module._Run._fit

        def fit(run, log, start_step, path, checkpointer, journal):
            if journal.rollbacks:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(run, log, start_step, path, checkpointer, journal)

        run_module._Run._fit = fit
    else:
        SpikeJournal._roll_back = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return runs.run(lines)


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize(("strategy", "world_size"), [("single", 1), slow("fsdp", 2)])
@pytest.mark.parametrize("written", [True, slow(False)])
def test_a_kill_in_a_roll_back_loses_nothing(prepared, tmp_path, strategy, world_size, written):
    bad = numbers_of(prepared, BAD)[:1]
    left_out(tmp_path / "without", (24, 28))
    lines = overrides(prepared, tmp_path, "without", strategy, "spike=roll_back")
    on_ranks(spiked, world_size, lines, bad, joins=False)
    lines = overrides(prepared, tmp_path, "cut", strategy, "spike=roll_back")
    ended = outcomes_on_ranks(killed_in_a_roll_back, world_size, lines, bad, written, joins=False)
    assert all(isinstance(outcome, RankFailedError) for outcome in ended)
    on_ranks(spiked, world_size, lines, bad, joins=False)
    assert_same_run(tmp_path / "without", tmp_path / "cut")
    assert [e["action"] for e in events(tmp_path / "cut")] == ["roll_back"]


@pytest.mark.slow
def test_two_roll_backs_of_one_checkpoint_and_the_third_spike_stops(prepared, tmp_path):
    # The second one is among the samples that came up for the first.
    bad = [numbers_of(prepared, step)[0] for step in (7, 8, 9)]
    more = ("spike=roll_back", "spike.max_rollbacks=2")
    lines = overrides(prepared, tmp_path, "run", "single", *more)
    (outcome,) = outcomes_on_ranks(spiked, 1, lines, bad, joins=False)
    assert isinstance(outcome, RankFailedError) and outcome.kind == "DivergedError"
    assert "after 2 roll backs" in outcome.message
    assert f"its samples are {bad[2]}," in outcome.message
    assert [(e["action"], e["step"]) for e in events(tmp_path / "run")] == [
        *(("roll_back", 7), ("roll_back", 7), ("stop", 7))
    ]
    written = json.loads((tmp_path / "run/left_out.json").read_text())
    assert written == {"left_out": [[24, 28], [28, 32]], "rollbacks": 2}
    # Another policy resumes from there.
    lines = overrides(prepared, tmp_path, "run", "single", "spike=skip")
    assert on_ranks(spiked, 1, lines, bad, joins=False)[0][0] == "complete"


@pytest.mark.slow
def test_a_lost_list_of_skipped_samples_is_reported(prepared, tmp_path):
    lines = overrides(prepared, tmp_path, "run", "single", "spike=roll_back", "checkpoint.every=2")
    bad = numbers_of(prepared, BAD)[:1]
    outcomes_on_ranks(killed_at, 1, lines, bad, 8, joins=False)
    (tmp_path / "run/left_out.json").unlink()
    (outcome,) = outcomes_on_ranks(spiked, 1, lines, bad, joins=False)
    assert isinstance(outcome, RankFailedError) and outcome.kind == "CheckpointError"
    assert "left out [[24, 28]]" in outcome.message


@pytest.mark.nightly
def test_a_rolled_back_run_resumes_at_another_world_size(prepared, tmp_path):
    bad = numbers_of(prepared, BAD)[:1]
    left_out(tmp_path / "without", (24, 28))
    lines = overrides(prepared, tmp_path, "without", "single", "spike=roll_back")
    on_ranks(spiked, 1, lines, bad, joins=False)
    on_two = overrides(prepared, tmp_path, "run", "fsdp", "spike=roll_back", "checkpoint.every=2")
    outcomes_on_ranks(killed_at, 2, on_two, bad, 8, joins=False)
    on_one = overrides(prepared, tmp_path, "run", "single", "spike=roll_back")
    on_ranks(spiked, 1, on_one, bad, joins=False)
    one, other = tmp_path / "without", tmp_path / "run"
    assert rest_of(one, STEPS)["progress"] == rest_of(other, STEPS)["progress"]
    for step, loss in records(one, "loss").items():
        assert records(other, "loss")[step] == pytest.approx(loss, abs=2e-5)
    counts = [rest_of(run, STEPS)["spikes"]["counts"].tolist() for run in (one, other)]
    assert counts[0] == counts[1]
    tensors = [tensors_of(run / f"checkpoints/step-{STEPS:09d}") for run in (one, other)]
    for key, value in tensors[0].items():
        if key.startswith("state_dict."):
            torch.testing.assert_close(tensors[1][key], value, atol=1e-4, rtol=1e-3)
