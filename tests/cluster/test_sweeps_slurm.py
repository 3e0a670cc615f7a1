"""`modtrain train -m hydra/launcher=slurm` on a real Slurm: stopped, cancelled, failed."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from saved import assert_same_bits, newest_tensors

from modtrain.experiments.sweep_state import state_of
from modtrain.training.run_directory import RunDirectory
from tests.conftest import run_modtrain

pytestmark = pytest.mark.slow
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
        command += ["hydra/launcher=slurm", "hydra.launcher.partition=main"]
        root = Path(__file__).parents[2]
        environment = {"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
        self.done = self.cluster.run(
            *command, check=False, cwd=self.folder, timeout=400, env=environment
        )

    def result(self):
        self.join(420)
        assert self.done is not None, "the sweep does not end"
        return self.done.returncode, self.done.stdout + self.done.stderr


def jobs(folder):
    return [RunDirectory(folder / f"runs/s/model.capacity={c}") for c in ("0.25", "0.5")]


def job_of(run):
    return json.loads((run.path / "jobs.jsonl").read_text().splitlines()[-1])["job"]


def await_saved(run, seconds=200):
    until = time.monotonic() + seconds
    while not list(run.checkpoints.glob("step-*")) and time.monotonic() < until:
        time.sleep(0.1)
    assert time.monotonic() < until


def test_jobs_that_are_stopped_come_back_and_end_as_if_undisturbed(cluster, tiny, tmp_path):
    alone = [o for o in tiny if not o.startswith("budget")]
    done = run_modtrain(
        *("train", *alone, "name=whole", f"budget.steps={STEPS}", "model.capacity=0.25"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    sweep = Sweep(cluster, tiny, tmp_path, "model.capacity=0.25,0.5")
    sweep.start()
    first, second = jobs(tmp_path)
    await_saved(first)
    # As before a time limit.
    cluster.run("scancel", "--signal=USR1", job_of(first))
    code, said = sweep.result()
    assert code == 0, said
    assert first.is_complete
    assert second.is_complete
    assert len(json.loads(first.manifest.read_text())["starts"]) == 2
    assert_same_bits(
        newest_tensors(tmp_path / "runs/whole", STEPS), newest_tensors(first.path, STEPS)
    )
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}
    assert {p.name for p in (tmp_path / "runs/s").iterdir() if not p.name.startswith(".")} == {
        *("sweep.json", "multirun.yaml", "tensorboard"),
        *("model.capacity=0.25", "model.capacity=0.5"),
    }


def test_a_failure_and_a_cancelled_job_are_told_without_sacct(cluster, tiny, tmp_path):
    sweep = Sweep(cluster, tiny, tmp_path, "model.capacity=0.25,0.5", "optimizer.lr=1e30")
    sweep.start()
    code, said = sweep.result()
    assert code == 1, said
    assert said.count("failed: TrainingError") == 2
    run = RunDirectory(tmp_path / "runs/s/model.capacity=0.5")
    assert state_of(run) == "failed"


def test_a_cancelled_job_is_not_waited_for(cluster, tiny, tmp_path):
    sweep = Sweep(cluster, tiny, tmp_path, "model.capacity=0.25,0.5", "budget.steps=3000")
    sweep.start()
    first, second = jobs(tmp_path)
    await_saved(first)
    await_saved(second)
    cluster.run("scancel", job_of(first), job_of(second))
    code, said = sweep.result()
    assert code == 75, said
    assert "2 stopped" in said


def test_one_run_of_two_processes(cluster, tiny, tmp_path):
    more = ["strategy=ddp", "hydra.launcher.tasks_per_node=2", "batch.tokens=512"]
    keep = [o for o in tiny if not o.startswith("batch.tokens")]
    sweep = Sweep(cluster, keep, tmp_path, "model.capacity=0.25,0.5", *more)
    sweep.start()
    code, said = sweep.result()
    assert code == 0, said
    run, _ = jobs(tmp_path)
    assert len(list((run.path / "tensorboard/hparams").glob("events*"))) == 1
