"""Preparing, training and evaluating as jobs that wait for each other, and options of a site."""

import json
import sys

import pytest

from tests.cluster.slurm.slurm_cluster import HERE
from tests.cluster.slurm.test_submit import submit


@pytest.mark.nightly
def test_training_waits_for_data_that_are_not_there_and_an_evaluation_for_both(
    cluster, tmp_path, words
):
    (tmp_path / "texts").mkdir()
    for number in range(20):
        text = f"tree {number} sings by the river " * 40
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    prepared = ["sources=['texts/*.txt']", "output=data/x", "tokenizer.vocab_size=280"]
    prepared += ["seq_len=32", "valid_fraction=0.2", "num_workers=1", "cluster=cpu"]
    (preparation,) = submit(cluster, tmp_path, "prepare", *prepared, "cluster.options=['--hold']")
    training = [*words, "data.path=data/x", "after=prepare-x"]
    with pytest.raises(AssertionError, match=r"batch\.tokens=500"):
        submit(cluster, tmp_path, *training, "batch.tokens=500", "data.seq_len=32")
    text = cluster.modtrain(tmp_path, "submit", *training)
    assert "data/x is not there yet" in text
    assert f"waits for job {preparation} of runs/prepare-x" in text
    evaluation = ["eval", "run=x", "sequences=8", "cluster=cpu", "after=x"]
    (last,) = submit(cluster, tmp_path, *evaluation)
    assert not (tmp_path / "data").exists()
    cluster.run("scontrol", "release", preparation)
    cluster.wait(last, "COMPLETED")
    assert "causal" in cluster.output(last)
    waiting = cluster.run(sys.executable, "-m", "modtrain", "wait", "run=x", cwd=tmp_path, env=HERE)
    assert waiting.stderr.strip() == "runs/x: complete"
    # Nothing to wait for any more.
    text = cluster.modtrain(tmp_path, "submit", *evaluation)
    assert "is complete: nothing to wait for" in text


@pytest.mark.nightly
def test_the_options_of_a_site_reach_slurm(cluster, tmp_path, words):
    more = [
        "cluster=gpu",
        "gpus_per_node=1",
        "cluster.gpu_request=per_task",
        "cluster.gpu_type=null",
    ]
    more += ["cluster.exclude=[node1]", "cluster.comment='my study'", "begin=now+2"]
    more += ["cluster.cpus_per_process=1", "cluster.memory_per_node=null"]
    more += ["""cluster.srun_options=["--mpi=none","--cpu-bind=none"]"""]
    (job,) = submit(cluster, tmp_path, *words, *more)
    details = cluster.details(job)
    assert details["ExcNodeList"] == "node1"
    assert details["Comment"].strip() == "my study"
    cluster.wait(job, "COMPLETED")
    usage = json.loads((tmp_path / "runs/x/usage.json").read_text())["starts"]
    (start,) = usage
    assert (start["job"], start["nodes"], start["end"]) == (job, 2, "complete")
    # It has waited for its nodes, after the time before which it was not to start.
    assert 0 <= start["queued"] < 60
    text = cluster.modtrain(tmp_path, "status", "run=x", "cost=true")
    assert "over 1 starts" in text


@pytest.mark.nightly
def test_a_run_that_is_given_up_is_announced(cluster, tmp_path, words):
    program = tmp_path / "notify"
    program.write_text(
        f'#!/bin/sh\necho "$1/$MODTRAIN_RUN/$MODTRAIN_CAUSE" >{tmp_path}/announced\n'
    )
    program.chmod(0o755)
    more = f"cluster.on_given_up=['{program}', \"it's over\"]"
    submit(cluster, tmp_path, *words, more, "--dry-run")
    script = tmp_path / "runs/x/submit.sbatch"
    script.write_text(script.read_text().replace("data.path=", "data.path=/gone"))
    cluster.wait(cluster.sbatch(script), "FAILED")
    text = (tmp_path / "announced").read_text()
    assert text.startswith(f"it's over/{tmp_path}/runs/x/")
    assert "/gone" in text


@pytest.mark.nightly
def test_workers_of_a_search_share_a_study(cluster, tmp_path, tiny):
    search = ["search", "study=s", "space.model.capacity=interval(0.1,0.5)", "trials=4", *tiny]
    (job,) = submit(cluster, tmp_path, *search, "workers=2", "cluster=cpu", "time=30")
    for task in range(2):
        cluster.wait(f"{job}_{task}", "COMPLETED")
    completed = list((tmp_path / "runs/s").glob("trial_*/COMPLETED"))
    assert len(completed) == 4
    # A job of its own each, and none of them in the directory above.
    assert not (tmp_path / "runs/jobs.jsonl").exists()
