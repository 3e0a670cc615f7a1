"""Jobs submitted to a real Slurm, by `modtrain submit` and by hand."""

import json
import os
import re
import shlex
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from modtrain.cluster.script import slurm_dir
from tests.cluster.slurm.slurm_cluster import ROOT, Cluster
from tests.helpers.waiting import wait_until


def submit(cluster: Cluster, cwd: Path, *words: str) -> list[str]:
    """Submit by the command line and return the jobs' numbers."""
    return re.findall(r"^submitted job (.*)$", cluster.modtrain(cwd, "submit", *words), re.M)


def submit_by_hand(
    cluster: Cluster, cwd: Path, script: str, arguments: list[str], *options: str, **env: str
) -> str:
    """Give a template to Slurm without `modtrain submit`, and return the job's number."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = ("--gpus-per-node=0", "--cpus-per-task=1", f"--chdir={cwd}", *options)
    environment = {"MODTRAIN_CODE": str(ROOT), "PATH": path, **env}
    return cluster.sbatch(slurm_dir() / script, *own, arguments=arguments, env=environment, cwd=cwd)


def jobs_of(run: Path) -> list[str]:
    return [json.loads(line)["job"] for line in (run / "jobs.jsonl").read_text().splitlines()]


def test_whatever_a_run_is_called_it_is_data(cluster, tmp_path, words):
    pwned = tmp_path / "pwned"
    name = f'it\'s $(touch {pwned.name}) `touch {pwned.name}` "%j" #x'
    quoted = name.replace("'", "\\'")
    (job,) = submit(cluster, tmp_path, *words, f"name='{quoted}'")
    cluster.wait(job, "COMPLETED")
    run = tmp_path / "runs" / name
    assert (run / "COMPLETED").is_file()
    assert "complete" in (run / f"logs/slurm-{job}.out").read_text()
    assert jobs_of(run) == [job]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    # Many processes of one run: each has found its place.
    manifest = json.loads((run / "manifest.json").read_text())
    assert len(manifest["starts"]) == 1
    assert manifest["starts"][0]["code"] is not None
    # Once it is complete, another job would take nodes for nothing.
    with pytest.raises(AssertionError, match="is complete already"):
        submit(cluster, tmp_path, *words, f"name='{quoted}'")


@pytest.mark.nightly
def test_a_job_runs_the_code_of_the_moment_it_was_submitted(cluster, tmp_path, words):
    own = tmp_path / "own/model"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text((ROOT / "conf/model/tiny.yaml").read_text())
    more = ["--config-dir", str(own.parent), "model=mine", "cluster.options=['--begin=now+8']"]
    (job,) = submit(cluster, tmp_path, *words, *more)
    (own / "mine.yaml").unlink()
    cluster.wait(job, "COMPLETED")


@pytest.mark.on_commit(1)
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_chain_resumes_where_the_last_job_stopped(cluster, tmp_path, words, launcher):
    # A job of this chain is told to stop as soon as it trains; the last one has no work left.
    more = ["budget.steps=1000", f"cluster.launcher={launcher}", "chain=complete"]
    more += ["checkpoint.every=500", "eval.every=1000", "log.every=20"]
    (first,) = submit(cluster, tmp_path, *words, *more)
    run = tmp_path / "runs/x"
    wait_until((run / "metrics.jsonl").is_file)
    cluster.run("scancel", "--batch", "--signal=USR1", first)
    cluster.wait(first, "FAILED")
    assert cluster.details(first)["ExitCode"].startswith("75:")
    assert not (run / "COMPLETED").exists()
    # It waits from the first one's start on, and has the next one wait in its turn.
    numbers = jobs_of(run)
    assert numbers[0] == first
    cluster.wait(numbers[1], "COMPLETED")
    cluster.wait(jobs_of(run)[2], "CANCELLED")
    assert (run / "COMPLETED").is_file()
    assert "resumes from step" in cluster.output(numbers[1])
    assert not (run / "failures.tsv").exists()


LONG = ["budget.steps=100000", "checkpoint.every=200", "eval.every=100000", "log.every=50"]


@pytest.mark.nightly
def test_a_job_ended_by_scancel_is_not_requeued(cluster, tmp_path, words, monkeypatch):
    """It is asked to save, and does not come back by itself."""
    # What a site's file ends with is not the job's end, and a user's defaults are not its settings.
    site = tmp_path / "site.sh"
    site.write_text('export SEEN=1\n[ -n "$NOT_SET" ] && export MORE=1\n')
    monkeypatch.setenv("SBATCH_NO_REQUEUE", "1")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "7")
    (job,) = submit(cluster, tmp_path, *words, *LONG, f"cluster.source=[{site}]")
    details = cluster.details(job)
    assert (details["Requeue"], details["TimeLimit"]) == ("1", "00:30:00")
    run = tmp_path / "runs/x"
    wait_until((run / "metrics.jsonl").is_file)
    cluster.run("scancel", job)
    cluster.wait(job, "CANCELLED")
    wait_until(lambda: "ended by scancel" in cluster.output(job))
    assert "ended with 1: continuing" in cluster.output(job)
    assert list((run / "checkpoints").glob("step-*"))
    assert cluster.details(job)["Restarts"] == "0"
    assert not (run / "failures.tsv").exists()


@pytest.mark.nightly
def test_what_may_not_be_requeued_is_submitted_again(cluster, tmp_path, words):
    # Nor is there an environment that comes in, and the tasks have the script's all the same.
    more = [
        "cluster.options=[--no-requeue, '--export=NONE']",
        "checkpoint.every=500",
        "budget.steps=1000",
    ]
    (first,) = submit(cluster, tmp_path, *words, *more, "eval.every=1000", "log.every=20")
    run = tmp_path / "runs/x"
    wait_until((run / "metrics.jsonl").is_file)
    cluster.run("scancel", "--batch", "--signal=USR1", first)
    cluster.wait(first, "FAILED")
    assert jobs_of(run)[0] == first
    cluster.wait(jobs_of(run)[1], "COMPLETED")
    assert (run / "COMPLETED").is_file()


@pytest.mark.nightly
def test_a_signal_to_one_task_of_an_array_is_its_own(cluster, tmp_path, words):
    """The task that starts last has the array's number."""
    more = '+array={one: ["seed=1"], two: ["seed=2"]}'
    words = [word for word in words if word not in ("nodes=2", "strategy=ddp")]
    (job,) = submit(cluster, tmp_path, *words, *LONG, more)
    runs = [tmp_path / "runs/x" / name for name in ("one", "two")]
    for run in runs:
        wait_until((run / "metrics.jsonl").is_file)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_1")
    wait_until(lambda: cluster.details(f"{job}_1")["Restarts"] == "1")
    other = cluster.details(f"{job}_0")
    assert (other["JobState"], other["Restarts"]) == ("RUNNING", "0")
    cluster.modtrain(tmp_path, "cancel", "run=x")


@pytest.mark.nightly
def test_the_jobs_of_a_chain_of_a_length_wait_for_one_another(cluster, tmp_path, words):
    numbers = submit(cluster, tmp_path, *words, "--chain", "2")
    assert len(numbers) == 2
    for number in numbers:
        cluster.wait(number, "COMPLETED")
    assert "nothing to train" in cluster.output(numbers[1])


def site_whose_modules_load(tmp_path: Path, when: str) -> list[str]:
    """Return overrides under which ``module load`` ends well where the test ``when`` does."""
    site = tmp_path / "site.sh"
    site.write_text(f"module() {{ [ {when} ]; }}\n")
    return [f"cluster.source=[{site}]", "cluster.modules=[cuda/13]"]


@pytest.mark.nightly
def test_a_node_that_cannot_be_prepared_is_reported_and_retried(cluster, tmp_path, words):
    site = site_whose_modules_load(tmp_path, '-n "$SLURM_RESTART_COUNT"')
    (job,) = submit(cluster, tmp_path, *words, *site)
    cluster.wait(job, "COMPLETED")
    run = tmp_path / "runs/x"
    assert (run / "COMPLETED").is_file()
    assert cluster.details(job)["Restarts"] == "1"
    assert "cuda/13 could not be loaded on node" in (run / "failures.tsv").read_text()


@pytest.mark.nightly
def test_a_chain_ends_where_its_run_is_given_up(cluster, tmp_path, words):
    """Until somebody submits it again."""
    site = site_whose_modules_load(tmp_path, "-e loads")
    numbers = submit(cluster, tmp_path, *words, *site, "--chain", "4")
    run = tmp_path / "runs/x"
    for number in numbers:
        cluster.wait(number, "FAILED")
    assert len((run / "failures.tsv").read_text().splitlines()) == 3
    assert "the run has failed for good" in cluster.output(numbers[3])
    assert "could not be loaded" in (run / "failure.json").read_text()
    (tmp_path / "loads").touch()
    (job,) = submit(cluster, tmp_path, *words, *site)
    cluster.wait(job, "COMPLETED")
    assert (run / "COMPLETED").is_file()
    assert not (run / "failure.json").exists()


def test_a_second_job_for_a_run_is_refused(cluster, tmp_path, words):
    submit(cluster, tmp_path, *words, "cluster.options=['--hold']")
    with pytest.raises(AssertionError, match="in the queue for this run already"):
        submit(cluster, tmp_path, *words)


@pytest.mark.nightly
def test_an_array_trains_a_run_in_each_task_and_an_evaluation_follows(cluster, tmp_path, words):
    more = '+array={low: ["optimizer.lr=1e-4"], high: ["optimizer.lr=1e-3", "strategy=fsdp"]}'
    (job,) = submit(cluster, tmp_path, *words, more)
    evaluation = ["eval", "run=x/high", "sequences=8", "cluster=cpu", f"after={job}"]
    (after,) = submit(cluster, tmp_path, *evaluation)
    assert cluster.state(after) == "PENDING"
    for task in range(2):
        cluster.wait(f"{job}_{task}", "COMPLETED")
    for name in ("low", "high"):
        assert (tmp_path / "runs/x" / name / "COMPLETED").is_file()
    assert jobs_of(tmp_path / "runs/x") == [job]
    assert jobs_of(tmp_path / "runs/x/high") == [f"{job}_1", after]
    cluster.wait(after, "COMPLETED")
    assert "causal" in cluster.output(after)


def test_a_wrong_configuration_is_not_tried_again(cluster, tmp_path, words):
    """It passes here and fails there: the data are gone."""
    submit(cluster, tmp_path, *words, "--dry-run")
    script = tmp_path / "runs/x/submit.sbatch"
    script.write_text(script.read_text().replace("data.path=", "data.path=/gone"))
    job = cluster.sbatch(script)
    cluster.wait(job, "FAILED")
    assert cluster.details(job)["ExitCode"].startswith("2:")
    assert cluster.details(job)["Restarts"] == "0"
    assert "/gone" in (tmp_path / "runs/x/failures.tsv").read_text()


def test_what_slurm_would_refuse_is_reported_at_once(cluster, tmp_path, words):
    with pytest.raises(AssertionError, match="invalid partition"):
        submit(cluster, tmp_path, *words, "cluster.partition=nowhere")
    assert not (tmp_path / "runs/x/jobs.jsonl").exists()


@pytest.mark.on_commit(1)
@pytest.mark.parametrize("name", ["train.sbatch", "train_nodes.sbatch", "array.sbatch"])
def test_a_template_works_by_hand(cluster, tmp_path, tiny, name):
    is_array = name == "array.sbatch"
    strategy = "ddp" if name == "train_nodes.sbatch" else "single"
    words = ["name=hand", *tiny, "batch.tokens=512", f"strategy={strategy}"]
    options = ["--ntasks-per-node=1", *(["--array=0"] if is_array else [])]
    job = submit_by_hand(cluster, tmp_path, name, words, *options)
    cluster.wait(f"{job}_0" if is_array else job, "COMPLETED")
    run = tmp_path / "runs" / ("rates/low" if is_array else "hand")
    assert (run / "COMPLETED").is_file()
    assert is_array or jobs_of(run) == [job]


@pytest.mark.nightly
def test_a_template_by_hand_submits_itself_again_with_its_arguments(cluster, tmp_path, tiny):
    words = ["name=hand", *tiny, *LONG]
    own = {"again": "resubmit"}
    job = submit_by_hand(cluster, tmp_path, "train.sbatch", words, "--ntasks-per-node=1", **own)
    run = tmp_path / "runs/hand"
    wait_until((run / "metrics.jsonl").is_file)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_until((run / "jobs.jsonl").is_file)
    wait_until(lambda: len(jobs_of(run)) > 1)
    first, number = jobs_of(run)[:2]
    assert first == job
    assert " name=hand model=tiny " in cluster.details(number)["Command"]


@pytest.mark.nightly
def test_preparing_and_comparing_by_hand(cluster, tmp_path, tiny):
    corpus = tmp_path / "texts"
    corpus.mkdir()
    for number in range(20):
        (corpus / f"{number}.txt").write_text(f"tree {number} sings by the river " * 40)
    prepared = ["sources=['texts/*.txt']", "output=data/x", "tokenizer.vocab_size=280"]
    prepared += ["seq_len=32", "valid_fraction=0.2", "num_workers=1"]
    job = submit_by_hand(cluster, tmp_path, "prepare.sbatch", prepared)
    cluster.wait(job, "COMPLETED")
    assert (tmp_path / "data/x/index.json").is_file()
    compared = ["name=two", *tiny, "+arms={a: ['seed=0'], b: ['seed=1']}", "timed_rounds=0"]
    job = submit_by_hand(cluster, tmp_path, "sweep_worker.sbatch", compared, verb="compare")
    cluster.wait(job, "COMPLETED")
    assert (tmp_path / "runs/two/b/COMPLETED").is_file()


@pytest.mark.nightly
def test_a_failure_that_is_not_counted_is_not_requeued(cluster, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("short")
    words = ["sources=['texts/*.txt']", "output=data/x"]
    job = submit_by_hand(cluster, tmp_path, "prepare.sbatch", words)
    cluster.wait(job, "FAILED")
    assert cluster.details(job)["Restarts"] == "0"
    assert "not restarted" in cluster.output(job)


@pytest.mark.nightly
def test_an_interactive_allocation_is_usable(cluster, tmp_path):
    (job,) = submit(
        cluster, tmp_path, "debug", "cluster=cpu", "nodes=2", "processes_per_node=2", "time=30"
    )
    cluster.wait(job, "RUNNING")
    details = cluster.details(job)
    assert (details["NumNodes"], details["Requeue"]) == ("2", "0")
    wait_until(lambda: "a shell on the first node" in cluster.output(job))
    shell, run = (text for text in cluster.output(job).splitlines() if "--overlap" in text)
    done = cluster.run("bash", "-c", shell.replace("--pty bash -l", "hostname"))
    assert done.stdout.strip() in cluster.nodes
    # On each node as many processes as a job of this size has.
    words = shlex.split(run)
    words[words.index("-m") - 1 :] = ["hostname"]
    done = cluster.run(*words)
    assert sorted(Counter(done.stdout.split()).values()) == [2, 2]


def test_a_container_gets_its_command_its_mounts_and_its_directory(cluster, tmp_path, words):
    """What Apptainer would be asked for, by a stand-in that does it without a container."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apptainer").write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@" >>"$ASKED"\n'
        'while [[ $1 != /images/* ]]; do shift; done\nshift\nexec "$@"\n'
    )
    (tools / "apptainer").chmod(0o755)
    asked = tmp_path / "asked"
    path = f"{tools}:{os.environ['PATH']}"
    environment = f"+cluster.environment={{PATH: '{path}', ASKED: '{asked}'}}"
    site = ["cluster.container=apptainer", "cluster.image='/images/mod train.sif'", environment]
    site += [f"cluster.python={sys.executable}", "cluster.mounts=[/data one]", "nodes=1"]
    words = [word for word in words if word != "nodes=2"]
    (job,) = submit(cluster, tmp_path, *words, *site, "strategy=single")
    cluster.wait(job, "COMPLETED")
    lines = asked.read_text().splitlines()
    assert lines[:2] == ["exec", "--nv"]
    mounts = [b for a, b in pairwise(lines) if a == "--bind"]
    assert mounts == [str(tmp_path), "/data one"]
    assert lines[lines.index("--pwd") + 1] == str(tmp_path)
    assert lines[lines.index("/images/mod train.sif") + 1] == sys.executable


@pytest.mark.nightly
def test_a_job_by_hand_is_seen_and_cancelled(cluster, tmp_path, tiny):
    """Submitted from inside slurm/, which is not where its runs are to be."""
    words = ["name=hand", f"runs_dir={tmp_path}/runs", *tiny, *LONG]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = (
        "--gpus-per-node=0",
        "--cpus-per-task=1",
        "--ntasks-per-node=1",
        f"--output={tmp_path}/out",
    )
    job = cluster.sbatch(
        *("train.sbatch", *options), arguments=words, env={"PATH": path}, cwd=slurm_dir()
    )
    run = tmp_path / "runs/hand"
    wait_until((run / "metrics.jsonl").is_file)
    assert f"{job}: running" in cluster.modtrain(tmp_path, "status", "run=hand")
    # Another one in its place does not disturb it.
    other = submit_by_hand(cluster, tmp_path, "train.sbatch", words, "--ntasks-per-node=1")
    cluster.wait(other, "FAILED")
    assert cluster.details(other)["ExitCode"].startswith("73:")
    assert not (run / "failures.tsv").exists()
    assert cluster.state(job) == "RUNNING"
    assert "saved now" in cluster.modtrain(tmp_path, "cancel", "run=hand")
    assert cluster.state(job) in ("FAILED", "CANCELLED")


@pytest.mark.nightly
@pytest.mark.parametrize("restart", ["chain=complete", "cluster.restart=resubmit"])
def test_the_next_job_survives_the_scripts_node(cluster, tmp_path, words, restart):
    more = ["budget.steps=1000", "checkpoint.every=100", "eval.every=1000", "log.every=20"]
    (first,) = submit(cluster, tmp_path, *words, *more, restart)
    run = tmp_path / "runs/x"
    wait_until(lambda: list((run / "checkpoints").glob("step-*")))
    node = cluster.details(first)["BatchHost"]
    cluster.kill_node(node)
    try:
        # Slurm requeues it by itself where it may: then the other one is not needed.
        ends = first if restart == "chain=complete" else jobs_of(run)[1]
        cluster.wait(ends, "COMPLETED")
        assert "resumes from step" in cluster.output(ends)
        if ends == first:
            assert len(jobs_of(run)) == 2
            cluster.wait(jobs_of(run)[1], "CANCELLED")
    finally:
        cluster.start_node(node)
        cluster.wait_for_nodes()


@pytest.mark.nightly
def test_nodes_are_free_soon_after_a_requeue(cluster, tmp_path, words):
    """And not only after KillWait, 30 s here."""
    (job,) = submit(cluster, tmp_path, *words, *LONG)
    wait_until((tmp_path / "runs/x/metrics.jsonl").is_file)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: "requeued" in cluster.output(job))
    began = time.monotonic()
    wait_until(lambda: cluster.details(job).get("JobState") in ("PENDING", "RUNNING"))
    wait_until(lambda: "completing" not in cluster.run("sinfo", "-h", "-o", "%T").stdout)
    assert time.monotonic() - began < 15
    wait_until(lambda: cluster.details(job)["Restarts"] == "1")


@pytest.mark.nightly
def test_what_cannot_start_is_not_left_in_the_queue(cluster, tmp_path, words):
    short = ("scontrol", "create", "PartitionName=short", "Nodes=ALL", "MaxTime=5")
    cluster.run(*short)
    closed = ("scontrol", "create", "PartitionName=closed", "Nodes=ALL", "AllowAccounts=other")
    cluster.run(*closed)
    for partition in ("short", "closed"):
        with pytest.raises(AssertionError, match="remedy"):
            submit(cluster, tmp_path, *words, f"cluster.partition={partition}")
    with pytest.raises(AssertionError, match="no job that Slurm knows"):
        submit(cluster, tmp_path, *words, "after=999999")
    assert not cluster.run("squeue", "--noheader").stdout


@pytest.mark.nightly
def test_an_evaluation_of_a_run_that_failed_does_not_wait_for_ever(cluster, tmp_path, words):
    (job,) = submit(cluster, tmp_path, *words, "cluster.options=['--begin=now+30']")
    (after,) = submit(cluster, tmp_path, "eval", "run=x", "cluster=cpu", f"after={job}")
    assert cluster.details(after)["JobName"] == "x-eval"
    text = cluster.modtrain(tmp_path, "status", "run=x")
    assert re.search(rf"evaluation +│ {after}: pending \(Dependency\)", text)
    cluster.run("scancel", job)
    cluster.wait(after, "CANCELLED")
