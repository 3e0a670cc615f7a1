"""Ranks that a command starts itself: what it takes, how it ends."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from modtrain.cli import main as cli
from modtrain.cli.local_ranks import local_ranks
from modtrain.common.errors import ConfigError
from modtrain.training.metrics_log import read_metrics
from tests.conftest import modtrain_command
from tests.helpers.problems import problems_of


def test_the_words_are_taken_out():
    ranks = local_ranks("train", ["a=1", "launch=local", "num_processes=4", "b=2"], {})
    assert (ranks.words, ranks.count) == (["a=1", "b=2"], 4)
    assert local_ranks("train", ["launch=local"], {}).count is None
    assert local_ranks("train", ["a=1", "model.launch=local"], {}) is None


@pytest.mark.parametrize(
    ("verb", "words", "key", "remedy"),
    [
        ("train", ["num_processes=2"], "num_processes", "add launch=local"),
        ("train", ["launch=slurm"], "launch", "modtrain submit"),
        ("train", ["launch=local", "num_processes=0"], "num_processes", "give 2"),
        ("train", ["launch=local", "num_processes=two"], "num_processes", "give 2"),
        ("submit", ["train", "launch=local"], "launch", "gpus_per_node"),
        ("train -m", ["launch=local"], "launch", "start each run with modtrain train"),
        ("compare", ["launch=local"], "launch", "start each run with modtrain train"),
        ("eval", ["num_processes=2"], "num_processes", "leave it out"),
        ("train", ["launch=local", "num_processes=auto"], "num_processes", "leave it out for one"),
    ],
)
def test_what_cannot_be_started_is_refused(verb, words, key, remedy):
    assert remedy in problems_of(local_ranks, verb, words, {})[key].remedy


def test_a_job_is_advised_for_submit_alone():
    for verb in ("eval", "compare", "train -m"):
        assert (
            "gpus_per_node"
            not in problems_of(local_ranks, verb, ["launch=local"], {})["launch"].remedy
        )


def test_ranks_of_a_launcher_start_no_others():
    with pytest.raises(ConfigError, match="one of 8 processes of a launcher"):
        local_ranks("train", ["launch=local"], {"RANK": "0", "WORLD_SIZE": "8"})


@pytest.mark.usefixtures("no_stop_request")
def test_a_mistake_is_reported_once_before_a_process_is_started(tiny, capsys, monkeypatch):
    monkeypatch.delenv("MODTRAIN_ACCELERATOR", raising=False)
    words = [*tiny, "launch=local", "batch.micro_batch_size=3"]
    assert cli.main(["train", *words, "num_processes=2"]) == 2
    assert capsys.readouterr().err.count("batch.tokens") == 1
    assert cli.main(["train", *words]) == 2
    assert "add num_processes=2" in capsys.readouterr().err


def started(tiny, folder):
    """Start two ranks that train until they are stopped; return once they have saved."""
    kept = [word for word in tiny if not word.startswith("budget.")]
    more = ["budget.steps=1000000", "checkpoint.every=20", "eval.every=null", "log=jsonl"]
    command = modtrain_command("train", *kept, *more, "launch=local", "num_processes=2")
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 240
    while not list(folder.glob("runs/*/saved_step")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


@pytest.mark.slow
def test_ctrl_c_stops_all_ranks_after_a_checkpoint(tiny, tmp_path):
    process = started(tiny, tmp_path)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "2 processes: strategy=ddp, for none was named" in output
    step = int(re.search(r"stopped by SIGINT: step (\d+) is saved", output)[1])
    assert output.count("is a new run; to resume it") == output.count("stopped by") == 1
    (run,) = (tmp_path / "runs").iterdir()
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] <= step


@pytest.mark.slow
@pytest.mark.nightly
def test_a_killed_rank_ends_the_others_and_is_named(tiny, tmp_path):
    process = started(tiny, tmp_path)
    children = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    ranks = {}
    for pid in children:
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        ranks |= {v.partition("=")[2]: int(pid) for v in variables if v.startswith("RANK=")}
    os.kill(ranks["1"], signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL" in output
