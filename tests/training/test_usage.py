"""What a run uses is recorded over all starts, whatever ends them."""

import json

import pytest

from modtrain.cli.compose import compose
from modtrain.common.reading import UnreadableError
from modtrain.training import usage
from modtrain.training.run import train
from modtrain.training.usage import (
    JOB_TIMES,
    USAGE,
    StartUsage,
    UsageRecord,
    cost_of_starts,
    read_usage,
)
from tests.helpers.runs import run_lines, stopping


def start(**values) -> StartUsage:
    return StartUsage(**{"begun": 1000.0, "until": 1000.0, **values})


def recorded(folder, *, first: int, last: int, last_recorded: int = 0, end: str = "") -> None:
    """A start that makes the steps after ``first``, each of 2 s and 10 FLOPs."""
    record = UsageRecord(folder, writes=True)
    record.begin(last_recorded, start(gpus=4))
    record.resume(first, 10 * first)
    for step in range(first + 1, last + 1):
        record.update(step, 10 * step, 2.0)
    if end:
        record.end(end)
    else:
        record._write()


def test_steps_that_a_kill_lost_are_counted(tmp_path):
    recorded(tmp_path, first=0, last=10)
    # It has recorded two more steps before it died.
    recorded(tmp_path, first=8, last=20, last_recorded=12, end="complete")
    one, two = read_usage(tmp_path)
    assert (one.last_step, one.end, two.first_step, two.end) == (12, "", 8, "complete")
    cost = cost_of_starts([one, two])
    assert (cost.starts, cost.device, cost.repeated_steps) == (2, "GPU", 4)
    assert cost.training_hours == pytest.approx(4 * (20 + 24) / 3600)
    assert cost.repeated_hours == pytest.approx(4 * 4 * 20 / 12 / 3600)


def test_steps_after_a_roll_back_are_made_again(tmp_path):
    record = UsageRecord(tmp_path, writes=True)
    record.begin(0, start(cpus=2))
    record.resume(0, 0)
    record.update(10, 100, 20)
    record.resume(4, 40)
    record.update(10, 100, 12)
    record.end("complete")
    (only,) = read_usage(tmp_path)
    assert (only.num_made, only.flops, only.num_repeated) == (16, 160, 6)
    cost = cost_of_starts([only])
    assert (cost.device, cost.repeated_steps) == ("core", 6)
    assert cost.repeated_hours == pytest.approx(6 * 2 * 2 / 3600)


def test_hours_begin_with_the_nodes_and_mfu_is_of_the_peak():
    values = {"gpus": 2, "peak_flops": 100.0, "flops": 9000.0, "last_step": 90, "until": 1200.0}
    one = start(**values, allocated=900.0, queued=60.0, training_seconds=90.0)
    cost = cost_of_starts([one])
    assert cost.hours == pytest.approx(2 * 300 / 3600)
    assert cost.queue_hours == pytest.approx(60 / 3600)
    assert cost.mfu == pytest.approx(9000 / (90 * 2 * 100))
    assert cost.mfu_of_all == pytest.approx(9000 / (300 * 2 * 100))
    unknown = start(**{**values, "peak_flops": None})
    assert cost_of_starts([one, unknown]).mfu is None


def test_what_is_refused_before_it_begins_is_no_start(tmp_path):
    recorded(tmp_path, first=0, last=3)
    UsageRecord(tmp_path, writes=True).end("OtherRunError: it is another run")
    assert [start.last_step for start in read_usage(tmp_path)] == [3]


def test_other_ranks_write_nothing(tmp_path):
    record = UsageRecord(tmp_path, writes=False)
    record.begin(0, start())
    record.resume(0, 0)
    record.update(1, 1, 1)
    record.end("complete")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", ["{}", '{"starts": [3]}', '{"starts": [{"begun": NaN, "until": 1}]}', "half"]
)
def test_a_damaged_file_is_reported_and_does_not_stop_a_run(content, tmp_path):
    (tmp_path / USAGE).write_text(content)
    with pytest.raises(UnreadableError):
        read_usage(tmp_path)
    recorded(tmp_path, first=0, last=1)
    assert json.loads((tmp_path / USAGE).read_text())["starts"][-1]["last_step"] == 1


def test_times_and_cores_are_those_of_the_job():
    environment = {JOB_TIMES: "100 160"}
    assert usage.job_times(environment) == (100, 160)
    # Of the runs of one job the first one has waited.
    assert usage.job_times(environment) == (None, None)
    assert usage.job_times({JOB_TIMES: "100"}) == (None, None)
    assert usage.job_times({}) == (None, None)
    assert usage.node_cpus({"SLURM_CPUS_ON_NODE": "12"}) == 12
    assert usage.node_cpus({}) >= 1
    job = {"SLURM_JOB_ID": "9"}
    assert usage.job_id(job) == "9"
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert usage.job_id(job | array) == "7_2"


@pytest.mark.slow
@pytest.mark.usefixtures("no_stop_request")
def test_each_start_of_a_run_is_recorded(prepared, tmp_path):
    lines = [*run_lines(prepared, tmp_path, "x"), "checkpoint.every=100"]
    with stopping(2):
        assert train(compose("train", lines)).status == "stopped"
    assert train(compose("train", lines)).status == "complete"
    one, two = read_usage(tmp_path / "x")
    assert (one.first_step, two.last_step) == (0, 4)
    assert one.last_step == two.first_step
    assert (one.end, two.end) == ("stopped by SIGTERM", "complete")
    assert two.training_seconds > 0
    assert two.flops > 0
    # A complete run uses nothing more.
    train(compose("train", lines))
    assert len(read_usage(tmp_path / "x")) == 2
