"""`modtrain wait` ends with the run, and its exit code says how."""

import threading
import time

import pytest

from modtrain.cluster import wait
from modtrain.cluster.config import WaitConfig
from modtrain.cluster.runs import RunNotFoundError
from modtrain.cluster.slurm import SlurmError
from tests.cluster.fake_runs import FakeRun, line, locked, play


def waited(tmp_path, run="x", **options) -> tuple[int, list[str]]:
    lines: list[str] = []
    config = WaitConfig(run=run, runs_dir=str(tmp_path), interval=0.01, **options)
    return wait.wait_for_run(config, lines.append), lines


def test_the_code_is_that_of_the_end(tmp_path):
    FakeRun(tmp_path / "complete").starts(90).ended()
    FakeRun(tmp_path / "failed").starts(90).failed(60, "out of memory")
    FakeRun(tmp_path / "stopped").starts(90)
    FakeRun(tmp_path / "never")
    codes = {name: waited(tmp_path, name)[0] for name in ("complete", "failed", "stopped", "never")}
    assert codes == {"complete": 0, "failed": 1, "stopped": 75, "never": 75}
    assert "out of memory" in waited(tmp_path, "failed")[1][0]
    with pytest.raises(RunNotFoundError):
        waited(tmp_path, "absent")


def test_it_waits_for_what_is_at_work(tmp_path):
    run = FakeRun(tmp_path / "x").starts(90)
    ended: list[tuple[int, list[str]]] = []
    thread = threading.Thread(target=lambda: ended.append(waited(tmp_path)))
    with locked(run.path):
        thread.start()
        time.sleep(0.2)
        assert ended == []
        run.ended()
    thread.join()
    ((code, lines),) = ended
    assert code == 0
    assert [text.rpartition(": ")[2] for text in lines] == ["running", "complete"]


def test_it_waits_at_most_so_long(tmp_path):
    run = FakeRun(tmp_path / "x").starts(90)
    with locked(run.path):
        code, lines = waited(tmp_path, timeout=0.05)
    assert code == 124
    assert "not ended within 0.05 s" in lines[-1]


def test_a_failure_that_is_restarted_is_no_end(tmp_path, monkeypatch):
    FakeRun(tmp_path / "x").starts(90).failed(60, "a node was lost").jobs("12")
    play(monkeypatch, tmp_path, line("12", "PENDING", "BeginTime", command=""))
    assert waited(tmp_path, timeout=0.1)[0] == 124
    play(monkeypatch, tmp_path)
    assert waited(tmp_path)[0] == 1


def test_slurm_that_does_not_answer_is_asked_again(tmp_path, monkeypatch):
    FakeRun(tmp_path / "x").starts(90).jobs("12")
    folder = play(monkeypatch, tmp_path, code=1, error="Unable to contact slurm controller")
    code, lines = waited(tmp_path, timeout=0.7)
    assert (code, lines[0].rpartition(": ")[2]) == (124, "Slurm does not answer")
    assert (folder / "calls").read_text().count("squeue") > 1
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="wait on a login node"):
        waited(tmp_path)


def test_of_several_runs_all_have_to_be_complete(tmp_path):
    for name in ("a", "b"):
        FakeRun(tmp_path / "x" / name).starts(90).ended()
    assert waited(tmp_path)[0] == 0
    FakeRun(tmp_path / "x/c").starts(90)
    assert waited(tmp_path)[0] == 75
    FakeRun(tmp_path / "x/d").starts(90).failed(30, "no")
    code, lines = waited(tmp_path)
    assert (code, lines) == (1, [f"{tmp_path}/x: 2 complete, 1 failed, 1 stopped"])
