"""What runs took: from their records, Slurm's accounting, and what neither has is named."""

import json

import pytest

from modtrain.cluster import cost, slurm
from modtrain.cluster.config import StatusConfig
from modtrain.cluster.cost import cost_of, costs_of
from modtrain.training.usage import StartUsage
from tests.cluster.fake_runs import NOW, FakeRun, play, shown

SACCT = """\
12|2026-11-30T10:00:00|2026-11-30T10:01:00|2026-11-30T11:01:00|16|billing=16,cpu=16,gres/gpu=8,node=1
12|2026-11-30T11:02:00|2026-11-30T11:04:00|2026-11-30T11:34:00|16|cpu=16,gres/gpu:a100=8,gres/gpu=8
13|Unknown|Unknown|Unknown|0|
"""


def a_run(tmp_path, *starts: StartUsage, ago=(900, 600, 300)) -> FakeRun:
    run = FakeRun(tmp_path / "x").starts(*ago[: len(starts)])
    entries = [vars(start) | {"begun": NOW - a} for start, a in zip(starts, ago, strict=False)]
    (run.path / "usage.json").write_text(json.dumps({"starts": entries}))
    return run


def start(end: str = "", seconds: float = 100, **values) -> StartUsage:
    return StartUsage(
        **{"begun": 0.0, "until": NOW, "training_seconds": seconds, "end": end} | values
    )


def with_sacct(monkeypatch, tmp_path, output: str) -> None:
    folder = play(monkeypatch, tmp_path)
    (folder / "lines").write_text(output)
    (folder / "sacct").write_text(f"#!/bin/sh\ncat {folder}/lines\n")
    (folder / "sacct").chmod(0o755)


def test_restarts_are_counted_by_cause(tmp_path):
    run = a_run(tmp_path, start(), start("stopped by SIGUSR1"), start(), ago=(900, 600, 300))
    run.starts(900, 600, 300, 200, 100)
    run.failed(650, "rank 3 on node7: Killed").failed(210, "rank 1 on node2: Killed")
    restarts = cost_of(run.read()).restarts
    assert restarts == {
        "rank N: Killed": 2,
        "stopped by SIGUSRN": 1,
        "killed, or its node was lost": 1,
    }


def test_a_run_of_an_earlier_version_names_what_is_unknown(tmp_path):
    run = FakeRun(tmp_path / "x").starts(900, 600).failed(700, "out of memory").jobs("12")
    result = cost_of(run.read())
    assert (result.starts, result.hours, result.repeated_hours) == (2, None, None)
    assert result.restarts == {"out of memory": 1}
    text = "; ".join(result.unknown)
    for part in ("what its starts used: an earlier version", "the hours", "in the queue"):
        assert part in text
    # One that was begun by an earlier version has records of its later starts.
    later = a_run(tmp_path / "later", start("complete"), ago=(600,)).starts(900, 600)
    result = cost_of(later.read())
    assert result.hours is not None
    assert "1 of its 2 starts" in result.unknown[0]


def test_slurms_accounting_knows_the_hours_of_killed_jobs(tmp_path, monkeypatch):
    with_sacct(monkeypatch, tmp_path, SACCT)
    run = FakeRun(tmp_path / "x").starts(900, 600).jobs("12", "13")
    ((result,), note) = costs_of([run.read()])
    assert note == ""
    assert (result.device, result.source) == ("GPU", "Slurm's accounting")
    assert result.hours == pytest.approx(8 * 1.5)
    assert result.queue_hours == pytest.approx(3 / 60)
    with_sacct(monkeypatch, tmp_path, SACCT.replace("gres/gpu", "license"))
    ((result,), _) = costs_of([run.read()])
    assert (result.device, result.hours) == ("core", pytest.approx(16 * 1.5))


def test_without_an_answer_the_records_count(tmp_path, monkeypatch):
    folder = play(monkeypatch, tmp_path)
    (folder / "sacct").write_text("#!/bin/sh\necho no slurmdbd >&2; exit 1\n")
    (folder / "sacct").chmod(0o755)
    run = a_run(tmp_path, start("complete", gpus=2)).jobs("12")
    ((result,), note) = costs_of([run.read()])
    assert "does not answer" in note
    assert result.source == "the run's own records"
    text = (
        (folder / "sacct")
        .read_text()
        .replace("no slurmdbd", "Slurm accounting storage is disabled")
    )
    (folder / "sacct").write_text(text)
    assert slurm.allocations(["12"]) == {}


def test_status_shows_it_and_writes_it(tmp_path):
    run = a_run(tmp_path / "runs", start("SIGTERM", gpus=4), start("complete", gpus=4, last_step=9))
    config = StatusConfig(run="x", runs_dir=str(tmp_path / "runs"), cost=True)
    text = shown(config)
    for part in ("GPU-hours", "over 2 starts", "made again", "1 by: SIGTERM", "unknown: the MFU"):
        assert part in text
    written = json.loads((run.path / cost.COST).read_text())
    assert written["restarts"] == {"SIGTERM": 1}
    FakeRun(tmp_path / "runs/y").starts(500)
    text = shown(StatusConfig(runs_dir=str(tmp_path / "runs"), cost=True))
    for part in ("x", "y", "all", "the cost of 2 runs is not known in full"):
        assert part in text
    assert "cannot be combined with cost" in str(StatusConfig(sweep="s", cost=True).problems()[0])
