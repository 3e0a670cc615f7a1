"""Several tasks prepare one corpus: real processes side by side, kills, and one after another."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modtrain.cli.main import main
from modtrain.common.atomic_io import acquire_lock
from modtrain.common.errors import ConfigError, DataError
from modtrain.data.prepare import shared
from modtrain.data.prepare.pipeline import prepare
from modtrain.data.prepare.report import PrepareReport
from modtrain.data.prepare.shared import prepare_task
from modtrain.data.prepare.task import Task, TaskReport
from tests.data.data_cases import make_documents, tiny_config, tree, write_jsonl

_PROGRAM = """
import sys, time
from tests.data.data_cases import tiny_config
from modtrain.data.prepare import encode, shared, units

units.LINES_UNIT_BYTES = 10_000
task, sources, output, pause = sys.argv[1:]
real = shared.encode_unit

def slowly(job):
    time.sleep(float(pause))
    return real(job)

shared.encode_unit = slowly
print(shared.prepare_task(tiny_config([sources], output, task=task, deduplicate=True)))
"""


@pytest.fixture
def start(tmp_path):
    """Start a task as a process; those that still run are ended."""
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    processes = []

    def begin(task: str, corpus: Path, output: Path, pause: float = 0.0):
        command = [sys.executable, str(program), task, str(corpus), str(output), str(pause)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def corpus_with_repeats(folder: Path) -> Path:
    documents = make_documents(400)
    return write_jsonl(folder / "corpus.jsonl", documents + documents[:100])


@pytest.mark.nightly
@pytest.mark.parametrize("count", [2, 3])
def test_tasks_side_by_side_give_the_bytes_of_one(tmp_path, small_units, start, count):
    corpus = corpus_with_repeats(tmp_path)
    output = tmp_path / "shared"
    started = [start(f"{index}/{count}", corpus, output) for index in range(count)]
    printed = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * count
    assert sum("is complete" in text for text in printed) == 1
    small_units(10_000)
    prepare(tiny_config([corpus], tmp_path / "one", deduplicate=True), progress=False)
    assert tree(output) == tree(tmp_path / "one")


@pytest.mark.slow
def test_a_killed_task_is_resumed_by_unit(tmp_path, small_units, start):
    corpus = corpus_with_repeats(tmp_path)
    output = tmp_path / "shared"
    units = output / ".work" / "units"
    killed, other = start("0/2", corpus, output, 0.3), start("1/2", corpus, output)
    while killed.poll() is None and len(list(units.glob("*.json"))) < 8:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert "units of others are open" in other.communicate()[0]
    assert other.returncode == 0
    before = {path.name: path.stat().st_mtime_ns for path in units.glob("*.json")}
    small_units(10_000)
    config = tiny_config([corpus], output, deduplicate=True, task="0/2")
    encoded = []
    real = shared.encode_unit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "encode_unit", lambda job: (encoded.append(job), real(job))[1])
        assert isinstance(prepare_task(config, progress=False), PrepareReport)
    assert len(encoded) + len(before) == -(-corpus.stat().st_size // 10_000)
    prepare(tiny_config([corpus], tmp_path / "one", deduplicate=True), progress=False)
    assert tree(output) == tree(tmp_path / "one")


def test_the_last_task_does_the_rest(tmp_path, small_units):
    small_units(5_000)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(100))
    reports = []
    for index in (2, 0, 1):
        config = tiny_config([corpus], tmp_path / "shared", task=f"{index}/3")
        reports.append(prepare_task(config, progress=False))
    assert [type(report) for report in reports] == [TaskReport, TaskReport, PrepareReport]
    assert f"{reports[0].num_open} units of others are open" in str(reports[0])
    assert reports[0].num_open > reports[1].num_open > 0
    again = prepare_task(config, progress=False)
    assert again.was_complete
    prepare(tiny_config([corpus], tmp_path / "one"), progress=False)
    assert tree(tmp_path / "shared") == tree(tmp_path / "one")


def test_a_task_leaves_the_rest_to_one_that_is_at_work(tmp_path, monkeypatch):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(60))
    output = tmp_path / "out"
    lock = output / ".work" / "lock"
    lock.parent.mkdir(parents=True)
    config = tiny_config([corpus], output, task="0/2")
    with acquire_lock(lock, is_shared=True):
        report = prepare_task(config, progress=False)
        assert isinstance(report, TaskReport)
        assert "Another task ends later" in str(report)
        # A prepare without tasks does not mix with them.
        with pytest.raises(DataError, match="another prepare"):
            prepare(config, progress=False)
    monkeypatch.setattr(shared, "_PATIENCE", 0.0)
    with acquire_lock(lock), pytest.raises(DataError, match="another prepare"):
        prepare_task(config, progress=False)
    assert isinstance(prepare_task(config, progress=False), PrepareReport)


def test_another_task_may_finish_everything_meanwhile(tmp_path, monkeypatch):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(60))
    config = tiny_config([corpus], tmp_path / "out", task="0/2")
    real = shared.num_unfinished

    def finish_before(files):
        prepare(config, progress=False)
        return real(files)

    monkeypatch.setattr(shared, "num_unfinished", finish_before)
    assert prepare_task(config, progress=False).was_complete
    assert not (tmp_path / "out" / ".work").exists()


def test_progress_counts_the_units_of_all_tasks(tmp_path, small_units, caplog):
    small_units(5_000)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(100))
    prepare_task(tiny_config([corpus], tmp_path / "out", task="0/2"), progress=False)
    with caplog.at_level("INFO"):
        prepare_task(tiny_config([corpus], tmp_path / "out", task="1/2"))
    lines = [line for line in caplog.messages if line.startswith("encoding")]
    # Then the last task finds that all is encoded.
    first, *_, last, merging = lines
    size = f"{corpus.stat().st_size / 1e6:.1f}"
    assert re.match(r"encoding: [4-9]\d% of ", first)
    assert re.fullmatch(rf"encoding: 100% of {size} MB, \d+\.\d MB/s, 0:00:00 left", last)
    assert merging == f"encoding: 100% of {size} MB"


@pytest.mark.parametrize(
    ("environment", "task"),
    [
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, (3, 4)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "5",
            },
            (2, 3),
        ),
        (
            {
                "SLURM_ARRAY_TASK_ID": "4",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": "1",
            },
            (5, 6),
        ),
        # A batch script of several tasks that has started none of them.
        ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, (0, 1)),
    ],
)
def test_tasks_of_slurm_are_numbered(environment, task):
    assert Task.of("slurm", environment) == Task(*task)


@pytest.mark.parametrize("text", ["slurm", "3/3", "0/0"])
def test_a_task_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match=f"task={text}"):
        Task.of(text, {})


def test_every_process_of_a_step_does_its_part(tmp_path, monkeypatch, capsys):
    """Other verbs without ranks are done by rank 0 alone."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(60))
    words = ["corpus=files", f"sources=[{corpus}]", f"output={tmp_path}/out", "num_workers=1"]
    words += ["tokenizer.vocab_size=300", "seq_len=16", "valid_fraction=0.2"]
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    step |= {"SLURM_JOB_ID": "1", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    assert main(["prepare", *words]) == 0
    assert capsys.readouterr().out == ""
    assert main(["prepare", *words, "task=slurm"]) == 0
    assert "task 1 of 2 has its units, 0; 1 units of others are open" in capsys.readouterr().out
