"""A sweep's table and what its command prints while Slurm lets its jobs wait; Slurm is played."""

import io
import os
from collections import Counter

from rich.console import Console

from modtrain.experiments.sweep import slurm_array
from modtrain.experiments.sweep.jobs import SweepJob, write_jobs
from modtrain.experiments.sweep.sweep_status import sweep_table
from modtrain.training.run_directory import RunDirectory
from tests.cluster.fake_runs import FakeRun, line, play


def test_the_table_names_the_jobs_that_wait_and_why(tmp_path, monkeypatch):
    sweep = tmp_path / "s"
    write_jobs(sweep, [SweepJob(name, {"seed": name}, []) for name in "abc"])
    FakeRun(sweep / "a", "budget.steps=3").starts(60).saved(2).jobs("7_0")
    # A file that cannot be read hides no run.
    os.mkfifo(sweep / "a/metrics.jsonl")
    (sweep / "b").mkdir()
    (sweep / "b/jobs.jsonl").write_text('{"job": "7_1"}\n')
    waiting = line("7_0", "PENDING", "BeginTime", command="")
    play(monkeypatch, tmp_path, waiting + line("7_1", "PENDING", "JobHeldUser", command=""))
    stream = io.StringIO()
    Console(file=stream, width=300).print(sweep_table(sweep))
    a, b, c = (row for row in stream.getvalue().splitlines() if row.startswith("│ "))
    assert "pending" in a and "BeginTime" in a and "2/3" in a
    assert "pending" in b and "JobHeldUser" in b
    assert "not started" in c


def test_what_the_command_waits_for_is_reported(tmp_path, monkeypatch):
    runs = {name: RunDirectory(tmp_path / name) for name in "ab"}
    for index, run in enumerate(runs.values()):
        run.path.mkdir()
        (run.path / "jobs.jsonl").write_text(f'{{"job": "7_{index}"}}\n')
    waiting = "".join(line(f"7_{index}", "PENDING", "JobHeldUser") for index in range(2))
    play(monkeypatch, tmp_path, waiting)
    assert slurm_array._remove_ended(runs, Counter()) == "2 pending: JobHeldUser"
    assert set(runs) == {"a", "b"}
