"""`modtrain train -m hydra/launcher=slurm` on a real Slurm: stopped, without power, failed."""

import json
import sys
import threading

import pytest

from modtrain.experiments.sweep.job_process import state_of
from modtrain.training.run_directory import RunDirectory
from tests.cluster.slurm.slurm_cluster import PATIENCE, ROOT
from tests.conftest import run_modtrain
from tests.helpers.saved import assert_same_bits, newest_tensors
from tests.helpers.waiting import wait_until

STEPS = 60


class Sweep(threading.Thread):
    """The command, on the login node, while the test does something else."""

    def __init__(self, cluster, tiny, folder, *more):
        super().__init__(daemon=True)
        keep = [o for o in tiny if not o.startswith("budget")]
        self.cluster, self.folder = cluster, folder
        self.arguments = [*keep, f"budget.steps={STEPS}", *more]
        self.done = None

    def run(self):
        command = [sys.executable, "-m", "modtrain", "train", "-m", "name=s", *self.arguments]
        command += ["hydra/launcher=slurm", "cluster=cpu", "cluster.partition=main"]
        self.done = self.cluster.run(
            *command, check=False, cwd=self.folder, timeout=PATIENCE, env={"PYTHONPATH": str(ROOT)}
        )

    def result(self):
        self.join(PATIENCE + 20)
        assert self.done is not None, "the sweep does not end"
        return self.done.returncode, self.done.stdout + self.done.stderr


def jobs(folder):
    return [RunDirectory(folder / f"runs/s/model.capacity={c}") for c in ("0.25", "0.5")]


def jobs_of(run):
    return [json.loads(line)["job"] for line in (run.path / "jobs.jsonl").read_text().splitlines()]


def job_of(run):
    return jobs_of(run)[-1]


def await_saved(run):
    wait_until(lambda: list(run.checkpoints.glob("step-*")), PATIENCE)


def await_running(cluster, run, before=None):
    """Wait until a job of the run's, another than ``before``, has begun."""
    wait_until(lambda: (run.path / "jobs.jsonl").is_file() and job_of(run) != before, PATIENCE)
    cluster.wait(job_of(run), "RUNNING")


@pytest.mark.nightly
def test_jobs_that_are_stopped_come_back_and_end_as_if_undisturbed(cluster, tiny, tmp_path):
    """One gets the stop signal before it listens, one loses its node; both end to the bit."""
    alone = [o for o in tiny if not o.startswith("budget")]
    for capacity in (0.25, 0.5):
        done = run_modtrain(
            *("train", *alone, f"name=whole{capacity}", f"budget.steps={STEPS}"),
            f"model.capacity={capacity}",
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
    capacities = "model.capacity=0.25,0.5"
    sweep = Sweep(cluster, tiny, tmp_path, capacities, "cluster.options=[--exclusive]")
    sweep.start()
    first, second = jobs(tmp_path)
    await_running(cluster, first)
    # As before a time limit.
    cluster.run("scancel", "--batch", "--signal=USR1", job_of(first))
    await_saved(second)
    node = cluster.details(job_of(second))["NodeList"]
    cluster.kill_node(node)
    try:
        code, output = sweep.result()
    finally:
        cluster.start_node(node)
        cluster.wait_for_nodes()
    assert code == 0, output
    assert len(json.loads(second.manifest.read_text())["starts"]) == 2
    assert cluster.details(job_of(first))["Restarts"] == "1"
    for run, capacity in ((first, 0.25), (second, 0.5)):
        assert_same_bits(
            newest_tensors(tmp_path / f"runs/whole{capacity}", STEPS),
            newest_tensors(run.path, STEPS),
        )
        assert len(list((run.path / "tensorboard").glob("events.out.*"))) >= 1
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}


@pytest.mark.nightly
def test_permanent_failures_are_reported_and_retried_on_request(cluster, tiny, tmp_path):
    capacities = "model.capacity=0.25,0.5"
    sweep = Sweep(cluster, tiny, tmp_path, capacities, "optimizer.lr=1e30")
    sweep.start()
    code, output = sweep.result()
    assert code == 1, output
    assert output.count(": DivergedError: ") == 2
    run = jobs(tmp_path)[1]
    assert state_of(run) == "failed"
    # As often as a job of its own is: once more, in case it was the machine.
    assert len((run.path / "failures.tsv").read_text().splitlines()) == 2
    again = Sweep(cluster, tiny, tmp_path, capacities, "optimizer.lr=1e30")
    again.start()
    assert again.result()[0] == 1
    assert "0 to train" in again.result()[1]
    before = job_of(run)
    more = Sweep(cluster, tiny, tmp_path, capacities, "optimizer.lr=1e30", "sweep.retry=true")
    more.start()
    await_running(cluster, run, before)
    assert more.result()[0] == 1
    # What it had failed by before does not count.
    assert len((run.path / "failures.tsv").read_text().splitlines()) == 4


@pytest.mark.nightly
def test_a_cancelled_job_is_not_waited_for_and_a_new_value_is_added(cluster, tiny, tmp_path):
    sweep = Sweep(cluster, tiny, tmp_path, "model.capacity=0.25,0.5", "budget.steps=20000")
    sweep.start()
    first, second = jobs(tmp_path)
    await_saved(first)
    await_saved(second)
    # While two are in the queue a third one comes.
    first_of_all = job_of(first)
    cluster.run("pkill", "-TERM", "-f", "modtrain train -m name=s ")
    assert sweep.result()[0] == 75
    assert "the jobs continue" in sweep.result()[1]
    more = Sweep(cluster, tiny, tmp_path, "model.capacity=0.25,0.5,0.75", "budget.steps=20000")
    more.start()
    third = RunDirectory(tmp_path / "runs/s/model.capacity=0.75")
    await_saved(third)
    assert job_of(first) == first_of_all
    cluster.run("scancel", *(job_of(run) for run in (first, second, third)))
    code, output = more.result()
    assert code == 75, output
    assert "3 stopped" in output


def test_one_run_of_two_processes_that_submits_itself_again(cluster, tiny, tmp_path):
    """A site without requeueing: a task of the array resumes under another number, alone."""
    more = ["strategy=ddp", "processes_per_node=2", "batch.tokens=512"]
    more += ["cluster.restart=resubmit", "at_once=1"]
    keep = [o for o in tiny if not o.startswith("batch.tokens")]
    sweep = Sweep(cluster, keep, tmp_path, "model.capacity=0.25,0.5", *more)
    sweep.start()
    first, second = jobs(tmp_path)
    await_saved(first)
    cluster.run("scancel", "--batch", "--signal=USR1", jobs_of(first)[0])
    code, output = sweep.result()
    assert code == 0, output
    assert first.is_complete
    assert second.is_complete
    # Each start has a job that waits to take its place.
    assert [len(jobs_of(run)) for run in (first, second)] == [3, 2]
    assert job_of(first).endswith("_0")
    assert len(list((first.path / "tensorboard").glob("events.out.*"))) >= 1
