"""A node that cannot run what it is given: it is named, and the next start is without it."""

import sys
from pathlib import Path

import pytest

from tests.cluster.slurm.test_submit import submit, submit_by_hand


def python_that_fails(folder: Path, how: str) -> str:
    """An interpreter that node2 does not have, or has without a package, or with an older one.

    The first job takes the first two nodes: node2 has rank 1.
    """
    python, instead = folder / "python", "exec /nowhere/python"
    if how == "ImportError":
        (folder / "lacking/hydra").mkdir(parents=True)
        (folder / "lacking/hydra/__init__.py").write_text("raise ImportError('no hydra here')\n")
        instead = f"export PYTHONPATH={folder}/lacking:$PYTHONPATH"
    if how == "version":
        (folder / "older/hydra_core-0.9.dist-info").mkdir(parents=True)
        (folder / "older/hydra_core-0.9.dist-info/METADATA").write_text(
            "Metadata-Version: 2.1\nName: hydra-core\nVersion: 0.9\n"
        )
        instead = f"export PYTHONPATH={folder}/older:$PYTHONPATH"
    python.write_text(
        f'#!/bin/bash\n[[ $SLURMD_NODENAME != node2 ]] || {instead}\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return f"cluster.python={python}"


@pytest.mark.on_commit("missing")
@pytest.mark.parametrize("how", ["missing", "ImportError", "version"])
def test_a_node_without_what_the_others_have_is_left_out(cluster, tmp_path, words, how):
    (job,) = submit(cluster, tmp_path, *words, python_that_fails(tmp_path, how))
    cluster.wait(job, "COMPLETED")
    (line,) = (tmp_path / "runs/x/failures.tsv").read_text().splitlines()
    *_, cause, node = line.split("\t")
    assert node == "node2"
    assert "the next start is without node2" in cluster.output(job)
    details = cluster.details(job)
    assert (details["ExcNodeList"], details["Restarts"]) == ("node2", "1")
    assert "bad node node2" in cluster.modtrain(tmp_path, "status", "run=x")
    if how == "version":
        # Before the first step, which every rank reports alike.
        assert cause.startswith("StartCheckError: ")
        assert "node2: hydra-core 0.9, which is" in cause
        return
    assert cause.startswith("rank 1 on node2: ")
    assert ("no hydra here" if how == "ImportError" else "/nowhere/python") in cause


@pytest.mark.nightly
def test_each_node_has_temporary_files_of_the_job_which_are_removed(cluster, tmp_path, words):
    """The program's temporary files go there on both nodes."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    python = tmp_path / "python"
    # After training; what the two have printed is in the job's log.
    python.write_text(
        f'#!/bin/bash\n{sys.executable} "$@"; code=$?\nls -d {scratch}/*; exit $code\n'
    )
    python.chmod(0o755)
    (job,) = submit(
        cluster, tmp_path, *words, f"cluster.scratch={scratch}", f"cluster.python={python}"
    )
    cluster.wait(job, "COMPLETED")
    assert cluster.output(job).count(f"{scratch}/modtrain-{job}") == 2
    assert list(scratch.iterdir()) == []


@pytest.mark.nightly
def test_a_chain_leaves_a_bad_node_out_too(cluster, tmp_path, words):
    python = python_that_fails(tmp_path, "missing")
    first, second = submit(cluster, tmp_path, *words, python, "--chain", "2")
    cluster.wait(first, "FAILED")
    cluster.wait(second, "COMPLETED")
    assert cluster.details(second)["ExcNodeList"] == "node2"


@pytest.mark.nightly
def test_a_gpu_job_does_not_train_on_the_cpu(cluster, tmp_path, words):
    """The nodes have GPUs for Slurm, and torch finds none."""
    gpus = ["cluster.gpus_per_node=1", "strategy.accelerator=auto"]
    (job,) = submit(cluster, tmp_path, *words, *gpus)
    cluster.wait(job, "FAILED")
    run = tmp_path / "runs/x"
    lines = [line.split("\t") for line in (run / "failures.tsv").read_text().splitlines()]
    # Both lack one, and none is left to take their places.
    assert [line[4] for line in lines] == ["node1,node2"] * 3
    assert all("has no cuda device" in line[3] for line in lines)
    assert not (run / "COMPLETED").exists()


@pytest.mark.nightly
def test_a_gpu_job_by_hand_does_not_train_on_the_cpu(cluster, tmp_path, tiny):
    words = ["name=x", *tiny, "strategy.accelerator=auto"]
    options = ("--gpus-per-node=1", "--ntasks-per-node=1", "--no-requeue")
    job = submit_by_hand(cluster, tmp_path, "train.sbatch", words, *options, again="nothing")
    cluster.wait(job, "FAILED")
    # What it ended with, and not as if a signal had stopped it.
    assert cluster.details(job)["ExitCode"].startswith("69:")
    assert "has no cuda device" in (tmp_path / "runs/x/failures.tsv").read_text()
