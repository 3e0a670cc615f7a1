"""What is a spike, what skips a step, and what is recorded of it."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modtrain.cli.compose import compose, conf_dir
from modtrain.common.errors import CheckpointError, ConfigError
from modtrain.data.stream.order import SampleOrder
from modtrain.data.stream.samplers import BatchPlan, RankBatchSampler, stream_positions
from modtrain.distributed.process_group import Ranks
from modtrain.training.plan import resolve
from modtrain.training.run_directory import RunDirectory
from modtrain.training.spikes.config import SPIKE_ACTIONS, SpikeConfig, resume_remedy
from modtrain.training.spikes.detector import Spike, SpikeDetector, skip_step
from modtrain.training.spikes.journal import SpikeJournal, check_left_out
from modtrain.training.step_statistics import restore_if
from tests.training.test_no_sync import step  # noqa: F401 a fixture

# Quarters, so that sums are exact and a value never lies on a limit by rounding alone.
VALUES = st.one_of(
    st.integers(0, 16).map(lambda n: n / 4), st.sampled_from([1000.0, math.nan, math.inf])
)
CONFIGS = st.builds(
    SpikeConfig,
    action=st.sampled_from(["stop", "skip", "roll_back"]),
    threshold=st.sampled_from([0.7, 2.3, 6.1]),
    window=st.integers(2, 6),
    warmup=st.integers(2, 9),
    max_in_a_row=st.integers(1, 3),
)


class Slow:
    """The rule, a value at a time: what was taken in is a list."""

    def __init__(self, config):
        self.config, self.taken = config, []
        self.in_a_row = self.skipped = 0
        self.halted = self.borders = False

    def limits(self):
        if len(self.taken) < self.config.warmup:
            return [math.inf, math.inf]
        window = np.array(self.taken[-self.config.window :])
        mean, deviation = window.mean(axis=0), window.std(axis=0, ddof=1)
        return mean + self.config.threshold * np.maximum(deviation, 1e-4 * np.abs(mean))

    def judge(self, seen):
        limits = self.limits()
        self.borders = any(
            abs(value - limit) < 1e-4 * (1 + abs(limit))
            for value, limit in zip(seen, limits, strict=False)
            if math.isfinite(limit)
        )
        is_spike = not all(map(math.isfinite, seen)) or any(
            value > limit for value, limit in zip(seen, limits, strict=False)
        )
        if self.halted:
            return True
        if not is_spike:
            self.in_a_row = 0
            self.taken.append(seen[:2])
            return False
        self.in_a_row += 1
        most = self.config.max_in_a_row if self.config.action == "skip" else 0
        self.halted = self.in_a_row > most
        self.skipped += not self.halted
        return True


def judged(detector, number, seen):
    return bool(detector.detect(number, torch.tensor(seen), torch.tensor(seen[0])))


@settings(max_examples=150, deadline=None)
@given(CONFIGS, st.lists(st.tuples(VALUES, VALUES, st.just(0.0)), max_size=24), st.integers(0, 24))
def test_reports_equal_those_of_the_slow_rule_also_when_resumed(config, steps, resumed):
    slow, detector = Slow(config), SpikeDetector(config)
    spikes = []
    for number, seen in enumerate(steps, 1):
        if number == resumed and not slow.halted:
            spikes += detector.take_report().spikes
            state = detector.state()
            detector = SpikeDetector(config)
            detector.load(state)
        expected = slow.judge(seen)
        if slow.borders:
            return
        assert judged(detector, number, seen) == expected
        limits = detector._limit().tolist()
        assert limits == pytest.approx(list(slow.limits()), rel=1e-4)
    report = detector.take_report()
    assert report.num_skipped == slow.skipped
    assert len(spikes + report.spikes) == slow.skipped + slow.halted
    assert [spike.halts for spike in spikes + report.spikes] == [False] * slow.skipped + [
        True
    ] * slow.halted
    assert detector.take_report().spikes == []


def test_what_else_is_not_finite_is_a_spike():
    detector = SpikeDetector(SpikeConfig(action="skip"))
    assert not judged(detector, 1, [1.0, 1.0, 1.0])
    assert judged(detector, 2, [1.0, 1.0, math.nan])


def test_rounding_makes_no_spike_of_equal_values():
    detector = SpikeDetector(SpikeConfig(action="skip", window=7, warmup=2))
    assert not any(judged(detector, number, [0.1, 1 / 3]) for number in range(1, 60))
    assert judged(detector, 60, [0.1001, 1 / 3])


@pytest.mark.parametrize("window", [3, 5, 12])
def test_another_window_keeps_the_newest_values(window):
    detector = SpikeDetector(SpikeConfig(action="skip", window=5, warmup=2))
    values = [float(n) for n in range(8)]
    for number, value in enumerate(values):
        # Falling: none is above the mean.
        assert not judged(detector, number, [-value, -value])
    other = SpikeDetector(SpikeConfig(action="skip", window=window, warmup=2))
    other.load(detector.state())
    kept = -np.array(values[-min(5, window) :])
    for new in (-8.0, -9.0):
        assert other._limit()[0] == pytest.approx(kept.mean() + 6 * kept.std(ddof=1))
        assert not judged(other, 9, [new, new])
        kept = np.append(kept, new)[-window:]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_skipped_keeps_every_bit(fused, first):
    matrix = torch.nn.Parameter(torch.randn(3, 4))
    vector = torch.nn.Parameter(torch.randn(4))
    optimizer = torch.optim.AdamW([{"params": [matrix]}, {"params": [vector]}], fused=fused)

    def make_step(is_skipped, factor=1.0):
        def closure():
            optimizer.zero_grad()
            ((matrix @ vector).square().sum() * factor).backward()
            skip_step(optimizer, torch.tensor(is_skipped))

        optimizer.step(closure)

    def kept():
        states = [value for state in optimizer.state.values() for value in state.values()]
        return [value.detach().clone() for value in (matrix, vector, *states)]

    if not first:
        make_step(False)
    before = kept()
    make_step(True, math.nan)
    after = kept()
    # Of a first step the state may be made, and is what no step leaves.
    assert all(map(torch.equal, before, after))
    assert not any(value.any() for value in after[len(before) :])
    make_step(False)
    assert not any(map(torch.equal, before, kept()))
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0 + (not first)}


def test_buffers_come_back_to_the_bit():
    buffers = [torch.tensor([0.1, -0.0]), torch.tensor(3)]
    for is_skipped, expected in ((torch.tensor(True), 3), (torch.tensor(False), 4), (None, 5)):
        with restore_if(is_skipped, buffers):
            buffers[0].add_(math.nan)
            buffers[1].add_(1)
        assert buffers[1] == expected
        assert buffers[0].isnan().all() == (expected > 3)


@pytest.mark.parametrize("more", [(), ("model.router.causal=[predictor,threshold]",)])
def test_detection_waits_for_nothing(step, more):  # noqa: F811
    detector = step("spike=skip", "spike.warmup=2", *more).spikes.detector
    report = detector.take_report()
    assert (report.spikes, report.last.step) == ([], 4)


WRONG = {"action": "wait", "threshold": 0.0, "window": 1, "warmup": 1}
WRONG |= dict.fromkeys(("max_in_a_row", "max_rollbacks", "rollback_steps"), 0)


def test_a_policy_that_cannot_work_is_reported(tiny):
    for key, value in WRONG.items():
        problems = SpikeConfig(**{key: value}).problems("spike")
        assert [problem.key for problem in problems] == [f"spike.{key}"]
    with pytest.raises(ConfigError, match=r"spike\.window=1: is not 2 or more"):
        resolve(compose("train", [*tiny, "name=x", "spike.window=1"]))


def test_every_policy_of_the_group_composes():
    names = sorted(path.stem for path in (conf_dir() / "spike").glob("*.yaml"))
    assert names == sorted(SPIKE_ACTIONS)
    for name in names:
        assert compose("train", ["name=x", f"spike={name}"]).spike == SpikeConfig(name)


def test_deepspeed_ends_at_a_nan_by_itself():
    for action, fits in (("skip", False), ("roll_back", False), ("stop", True)):
        problems = SpikeConfig(action=action).strategy_problems("spike", "deepspeed_2")
        assert (problems == []) == fits
    config = compose("train", ["name=x", "spike=skip", "strategy=deepspeed_1"])
    assert "spike.action" in [problem.key for problem in config.problems()]


LEAPS, NO_NUMBER = (True, False)


@pytest.mark.parametrize(
    ("action", "strategy", "is_finite", "ways"),
    [
        ("none", "ddp", NO_NUMBER, ["spike=skip", "spike=roll_back"]),
        ("stop", "ddp", NO_NUMBER, ["spike=skip", "spike=roll_back"]),
        ("stop", "ddp", LEAPS, ["spike=skip", "spike=roll_back", "spike=none"]),
        ("skip", "ddp", NO_NUMBER, ["a larger spike.max_in_a_row", "spike=roll_back"]),
        ("roll_back", "ddp", LEAPS, ["spike=skip", "a larger spike.max_rollbacks", "spike=none"]),
        ("none", "deepspeed_2", NO_NUMBER, ["strategy=fsdp spike=skip", "strategy=fsdp spike=ro"]),
        ("stop", "deepspeed_2", LEAPS, ["strategy=fsdp", "strategy=fsdp", "spike=none"]),
    ],
)
def test_a_stopped_run_names_its_remedies(action, strategy, is_finite, ways):
    remedy = resume_remedy(SpikeConfig(action), strategy, is_finite)
    named = remedy.partition(". ")[0].removeprefix("start it again with ").split("; or with ")
    assert len(named) == len(ways)
    assert all(one.startswith(other) for one, other in zip(named, ways, strict=True))


@pytest.mark.parametrize(
    ("figures", "is_finite"),
    [
        ((9.0, 1.0, 2.0, 2.0), LEAPS),
        ((1.0, 9.0, 2.0, 2.0), LEAPS),
        ((math.nan, 1.0, 2.0, 2.0), NO_NUMBER),
        ((9.0, math.inf, 2.0, 2.0), NO_NUMBER),
        # Something else is no number: in the warm-up, and after it.
        ((9.0, 1.0, math.inf, math.inf), NO_NUMBER),
        ((1.0, 1.0, 2.0, 2.0), NO_NUMBER),
    ],
)
def test_a_leap_is_no_nan(figures, is_finite):
    assert Spike(3, *figures, own_loss=1.0, halts=True).is_finite == is_finite


STRETCHES = st.lists(st.integers(0, 60), unique=True, max_size=8).map(
    lambda ends: [
        (first, stop) for first, stop in zip(sorted(ends)[::2], sorted(ends)[1::2], strict=False)
    ]
)


@settings(deadline=None)
@given(STRETCHES, st.integers(0, 12), st.sampled_from([(1, 4), (2, 2), (4, 1)]))
def test_every_world_size_skips_the_same_samples(stretches, start, shape):
    world_size, accumulate = shape
    order = SampleOrder(37, 5)
    ranks = [
        RankBatchSampler(order, BatchPlan(1, accumulate, 12, world_size, rank), start, stretches)
        for rank in range(world_size)
    ]
    numbers = [
        number
        for micro_batches in zip(*map(list, ranks), strict=True)
        for batch in micro_batches
        for number in batch
    ]
    skipped = [n for first, stop in stretches for n in range(first, stop)]
    stream = order.lookup(np.delete(np.arange(200), skipped)[: 12 * 4])
    assert numbers == stream[start * 4 :].tolist()


def a_spike(number):
    return Spike(number, 9.0, math.inf, 2.0, 1.0, 9.0, True)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 6), st.none() | st.integers(1, 4)), max_size=5
    )
)
def test_roll_backs_take_out_what_was_read_since(tmp_path_factory, rolls):
    """Each in turn, from any checkpoint: against a stream from which the samples are deleted."""
    journal = SpikeJournal(RunDirectory(tmp_path_factory.mktemp("run")), Ranks.create())
    stream = list(range(1000))
    for count, (to_step, steps, most) in enumerate(rolls, 1):
        last = to_step + steps
        journal.pending = (a_spike(last), [1])
        message = journal.resume(to_step, 4, SpikeConfig("roll_back", rollback_steps=most))
        assert f"step {last} is a spike" in message
        first = to_step if most is None else max(to_step, last - most)
        del stream[4 * first : 4 * last]
        positions = stream_positions(np.arange(200), journal.skipped_samples)
        assert positions.tolist() == stream[:200]
        again = SpikeJournal(journal.run, Ranks.create())
        assert (again.skipped_samples, again.rollbacks) == (journal.skipped_samples, count)
        assert again.resume(to_step, 4, SpikeConfig("roll_back")) == ""


def test_events_stay_but_for_skips_that_come_again(tmp_path):
    journal = SpikeJournal(RunDirectory(tmp_path), Ranks.create())
    for action, number in (("skip", 3), ("skip", 8), ("stop", 9), ("roll_back", 9)):
        journal.write(action, a_spike(number), [7])
    journal.resume(5, 4, SpikeConfig("skip"))
    events = [json.loads(line) for line in journal.events.read_text().splitlines()]
    assert [(e["action"], e["step"]) for e in events] == [
        *(("skip", 3), ("stop", 9), ("roll_back", 9))
    ]
    assert (events[0]["loss"], events[0]["grad_norm"], events[0]["samples"]) == (9.0, "inf", [7])


@pytest.mark.parametrize("content", ["{", "{}", '{"left_out": [3], "rollbacks": 1}'])
def test_a_damaged_list_is_reported(tmp_path, content):
    (tmp_path / "left_out.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"left_out\.json cannot be read"):
        SpikeJournal(RunDirectory(tmp_path), Ranks.create())


def test_a_checkpoint_and_the_list_have_to_agree_as_far_as_it_read():
    check_left_out([(4, 8), (20, 24)], [[4, 8]], 20)
    for listed, saved in (([], [[4, 8]]), ([(4, 8)], []), ([(4, 12)], [[4, 8]])):
        with pytest.raises(CheckpointError, match="left out"):
            check_left_out(listed, saved, 20)
