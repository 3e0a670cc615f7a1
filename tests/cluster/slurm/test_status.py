"""Runs on a real Slurm: listed, followed over a requeue, and cancelled for good."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.slurm.slurm_cluster import HERE, MINISLURM, PATIENCE
from tests.helpers.waiting import wait_until

# A job that saves at USR1 and comes back by itself, whatever is written in its directory.
STUBBORN = """#!/bin/bash
#SBATCH --open-mode=append
save() {
  mkdir -p checkpoints/step-000000005
  echo '{"step": 5}' >checkpoints/step-000000005/manifest.json
}
# An array's last task has the number of the array, by which all of them would be requeued.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
trap 'echo told; save; scontrol requeue ${job:-$SLURM_JOB_ID}; sleep 60' USR1
echo "start ${SLURM_RESTART_COUNT:-0}"
while [ ! -e go ]; do sleep .2; done
echo "the end"
"""


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "runs/x"
    (folder / "logs").mkdir(parents=True)
    (folder / "submit.sbatch").write_text(STUBBORN)
    return folder


def start(cluster, run: Path, *options: str) -> str:
    """Give a run's script to Slurm, and note its number as `modtrain submit` does."""
    script = run / "submit.sbatch"
    job = cluster.sbatch(script, "--output=logs/slurm-%j.out", f"--chdir={run}", *options)
    with (run / "jobs.jsonl").open("a") as file:
        file.write(json.dumps({"job": job, "script": str(script)}) + "\n")
    return job


def test_what_waits_and_what_runs_is_listed_with_slurms_reason(cluster, run, tmp_path):
    first = start(cluster, run)
    second = start(cluster, run, f"--dependency=afterany:{first}")
    cluster.wait(first, "RUNNING")
    text = cluster.modtrain(tmp_path, "status")
    row = next(row for row in text.splitlines() if row.startswith("│ x"))
    assert "running" in row and f"{first} +1" in row
    text = cluster.modtrain(tmp_path, "status", "run=x")
    assert f"{first}: running, on node" in text
    assert f"{second}: pending (Dependency)" in text
    cluster.run("scontrol", "hold", second)
    cluster.run("scancel", first)
    cluster.wait(first, "CANCELLED")
    text = cluster.modtrain(tmp_path, "status", "run=x")
    assert "pending: JobHeld" in text
    assert f"{first}: cancelled" in text


@pytest.mark.nightly
def test_logs_follow_over_a_requeue_to_the_end(cluster, run, tmp_path):
    job = start(cluster, run)
    cluster.wait(job, "RUNNING")
    output = run / f"logs/slurm-{job}.out"
    wait_until(output.is_file)
    words = [sys.executable, "-m", "modtrain", "logs", "run=x", "follow=true"]
    place = {"MINISLURM_DIR": str(cluster.directory), "PATH": "/usr/sbin:/usr/bin:/bin"}
    followed = subprocess.Popen(
        [MINISLURM, "exec", *words],
        **{"cwd": tmp_path, "env": {**HERE, **place}, "stdout": subprocess.PIPE, "text": True},
    )
    try:
        assert followed.stdout.readline() == "start 0\n"
        cluster.run("scontrol", "requeue", job)
        # Between them Slurm prints that it requeued the job.
        assert "start 1\n" in (followed.stdout.readline(), followed.stdout.readline())
        assert followed.poll() is None
        (run / "go").touch()
        assert followed.communicate(timeout=PATIENCE)[0].endswith("the end\n")
        assert followed.returncode == 0
    finally:
        followed.kill()
        followed.wait()


@pytest.mark.nightly
def test_cancel_ends_a_chain_and_what_comes_back_by_itself(cluster, run, tmp_path):
    first = start(cluster, run)
    second = start(cluster, run, f"--dependency=afterany:{first}")
    wait_until((run / f"logs/slurm-{first}.out").is_file)
    text = cluster.modtrain(tmp_path, "cancel", "run=x")
    assert f"job {first}: signalled to save" in text
    assert "can be resumed from step 5, saved now" in text
    assert [cluster.state(job) for job in (first, second)] == ["CANCELLED", "CANCELLED"]
    assert cluster.output(first).count("told") == 1
    assert not (run / f"logs/slurm-{second}.out").exists()
    assert (run / "CANCELLED").read_text().split() == [first, second]
    assert "nothing to cancel" in cluster.modtrain(tmp_path, "cancel", "run=x")


@pytest.mark.nightly
def test_cancel_of_an_array_asks_every_task(cluster, run, tmp_path):
    job = start(cluster, run, "--array=0-2", "--output=logs/slurm-%A_%a.out")
    wait_until(lambda: sum("start" in p.read_text() for p in run.glob("logs/slurm-*.out")) == 3)
    text = cluster.modtrain(tmp_path, "cancel", "run=x")
    assert f"job {job}_0, {job}_1, {job}_2: signalled to save" in text
    for task in range(3):
        assert cluster.state(f"{job}_{task}") == "CANCELLED"
        assert (run / f"logs/slurm-{job}_{task}.out").read_text().count("told") == 1
    assert "told" in cluster.modtrain(tmp_path, "logs", "run=x", f'job="{job}_1"')


@pytest.mark.nightly
def test_a_job_that_does_not_save_is_killed(cluster, run, tmp_path):
    lines = STUBBORN.splitlines(keepends=True)
    deaf = [line if "trap" not in line else "trap '' USR1 TERM\n" for line in lines]
    (run / "submit.sbatch").write_text("".join(deaf))
    job = start(cluster, run)
    wait_until((run / f"logs/slurm-{job}.out").is_file)
    text = cluster.modtrain(tmp_path, "cancel", "run=x", "wait=2")
    assert f"job {job}: ended after 2 s" in text and "has no checkpoint" in text
    assert cluster.state(job) == "CANCELLED"


def test_a_run_in_training_saves_is_cancelled_and_can_resume(cluster, tmp_path, tiny):
    words = ["train", "name=x", *tiny, "strategy=ddp", "batch.tokens=512", "log.progress=false"]
    site = ["cluster=cpu", "nodes=2", "time=30", "cluster.lead=60", "budget.steps=4000"]
    cluster.modtrain(tmp_path, "submit", *words, *site, "chain=2", "eval.every=1000")
    run = tmp_path / "runs/x"
    jobs = [json.loads(line)["job"] for line in (run / "jobs.jsonl").read_text().splitlines()]
    wait_until((run / "metrics.jsonl").is_file)
    text = cluster.modtrain(tmp_path, "status")
    row = next(row for row in text.splitlines() if row.startswith("│ x"))
    assert "running" in row and "/4000" in row
    assert "saved now" in cluster.modtrain(tmp_path, "cancel", "run=x")
    time.sleep(3)
    assert cluster.state(jobs[1]) == "CANCELLED"
    assert cluster.state(jobs[0]) in ("FAILED", "CANCELLED")
    assert "stopped by a signal" not in cluster.output(jobs[0])
    assert not (run / "failures.tsv").exists()
    assert "stopped" in cluster.modtrain(tmp_path, "status", "run=x")
    assert "to resume" in cluster.modtrain(tmp_path, "logs", "run=x", "lines=20")
