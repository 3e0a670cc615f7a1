"""What `modtrain cancel` asks of Slurm, which is played, and what it prints."""

from pathlib import Path

import pytest

from modtrain.cli.main import main
from modtrain.cluster import slurm
from modtrain.cluster.cancel import cancel_run
from modtrain.cluster.config import CancelConfig
from modtrain.cluster.slurm import SlurmError, SlurmJob
from tests.cluster.fake_runs import FakeRun, Group, locked, play


def cancelled(root: Path, **changes) -> list[str]:
    messages: list[str] = []
    cancel_run(CancelConfig(run="r", runs_dir=str(root), **changes), messages.append)
    return messages


def test_without_a_job_there_is_nothing_to_cancel(tmp_path, capsys):
    run = FakeRun(tmp_path / "r").starts(9)
    asked = ["cancel", "run=r", f"runs_dir={tmp_path}"]
    assert main(asked) == 0
    assert "nothing to cancel" in capsys.readouterr().out
    assert not (run.path / "CANCELLED").exists()
    with locked(run.path):
        assert main(asked) == 1
    assert "Ctrl-C" in capsys.readouterr().err
    assert main(["cancel", "run=q", f"runs_dir={tmp_path}"]) == 1
    assert main(["cancel"]) == 2


def test_without_slurm_the_jobs_of_a_run_cannot_be_cancelled(tmp_path, monkeypatch):
    FakeRun(tmp_path / "r").jobs("7")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="login node"):
        cancelled(tmp_path)


class PlayedSlurm:
    """Jobs that wait, run, and end when they are cancelled."""

    def __init__(self, monkeypatch, saves: bool, **states: str) -> None:
        self.states = {name.removeprefix("j"): state for name, state in states.items()}
        self.saves, self.calls, self.monkeypatch = saves, [], monkeypatch
        for name in ("jobs", "cancel", "signal_save"):
            monkeypatch.setattr(slurm, name, getattr(self, name))
        monkeypatch.setattr("modtrain.cluster.cancel._POLL_SECONDS", 0.01)

    def jobs(self, ids):
        return {name: SlurmJob(name, state) for name, state in self.states.items() if name in ids}

    def cancel(self, ids):
        self.calls.append(("cancel", *ids))
        self.states.update(dict.fromkeys(ids, "CANCELLED"))

    def signal_save(self, ids):
        self.calls.append(("save", *ids))
        if self.saves:
            # As with a script that knows of no mark: it is requeued.
            self.states.update(dict.fromkeys(ids, "PENDING"))


def test_waiting_jobs_are_ended_first_then_the_running_one_saves(tmp_path, monkeypatch):
    run = FakeRun(tmp_path / "r").starts(9).jobs("1", "2", "3", "4").saved(8)
    played = PlayedSlurm(
        monkeypatch, True, j1="COMPLETED", j2="RUNNING", j3="PENDING", j4="PENDING"
    )
    messages = cancelled(tmp_path, wait=5)
    assert played.calls == [("cancel", "3", "4"), ("save", "2"), ("cancel", "2")]
    assert (run.path / "CANCELLED").read_text().split() == ["1", "2", "3", "4"]
    assert "be resumed from step 8, saved before" in messages[-1]


def test_a_job_that_does_not_save_is_ended_after_the_wait(tmp_path, monkeypatch):
    FakeRun(tmp_path / "r").starts(9).jobs("2")
    played = PlayedSlurm(monkeypatch, False, j2="RUNNING")
    messages = cancelled(tmp_path, wait=0.1)
    assert played.calls == [("save", "2"), ("cancel", "2")]
    assert "ended after 0.1 s" in messages[1] and "no checkpoint" in messages[-1]


def test_save_false_asks_for_nothing(tmp_path, monkeypatch):
    FakeRun(tmp_path / "r").starts(9).jobs("2", "3")
    played = PlayedSlurm(monkeypatch, True, j2="RUNNING", j3="PENDING")
    cancelled(tmp_path, save=False)
    assert played.calls == [("cancel", "3"), ("cancel", "2")]


def test_a_job_that_does_not_end_is_reported(tmp_path, monkeypatch):
    FakeRun(tmp_path / "r").starts(9).jobs("2")
    played = PlayedSlurm(monkeypatch, False, j2="RUNNING")
    monkeypatch.setattr(slurm, "cancel", lambda ids: played.calls.append("in vain"))
    monkeypatch.setattr("modtrain.cluster.cancel._KILL_GRACE", 0.1)
    with pytest.raises(SlurmError, match=r"job 2 does not end"):
        cancelled(tmp_path, save=False)


def denies(played: PlayedSlurm, *denied: str, named: bool = True) -> None:
    """Let commands for these jobs fail, and be done to the others, as scancel does."""

    def refuse(do):
        def asked(ids):
            do([name for name in ids if name not in denied])
            if refused := [name for name in ids if name in denied]:
                of = f" on job id {refused[0]}" if named else ""
                error = f"scancel: error: Kill job error{of}: Access/permission denied"
                raise slurm.DeniedError(f"scancel {' '.join(ids)} failed: {error}", error)

        return asked

    for name in ("cancel", "signal_save"):
        played.monkeypatch.setattr(slurm, name, refuse(getattr(played, name)))


@pytest.mark.parametrize("state", ["RUNNING", "PENDING"])
@pytest.mark.parametrize("changes", [{}, {"save": False}])
def test_another_users_job_is_neither_ended_nor_marked(tmp_path, monkeypatch, state, changes):
    run = FakeRun(tmp_path / "r").starts(9).jobs("1", "501")
    denies(PlayedSlurm(monkeypatch, False, j501=state), "501")
    monkeypatch.setattr("modtrain.cluster.cancel._KILL_GRACE", 0.1)
    messages: list[str] = []
    config = CancelConfig(run="r", runs_dir=str(tmp_path), wait=0.1, **changes)
    with pytest.raises(slurm.DeniedError):
        cancel_run(config, messages.append)
    assert messages == []
    assert not (run.path / "CANCELLED").exists()
    # What an earlier call named stays.
    (run.path / "CANCELLED").write_text("1\n")
    with pytest.raises(SlurmError, match="denied"):
        cancelled(tmp_path, **changes)
    assert (run.path / "CANCELLED").read_text() == "1\n"


@pytest.mark.parametrize(
    ("named", "states", "kept"),
    [
        (True, {"j2": "RUNNING", "j501": "RUNNING"}, ["2"]),
        (False, {"j2": "RUNNING", "j501": "RUNNING"}, []),
        (True, {"j2": "PENDING", "j501": "RUNNING"}, ["2"]),
        (True, {"j2": "RUNNING", "j501": "PENDING"}, []),
    ],
)
def test_what_was_ended_stays_marked(tmp_path, monkeypatch, named, states, kept):
    run = FakeRun(tmp_path / "r").starts(9).jobs("2", "501")
    denies(PlayedSlurm(monkeypatch, False, **states), "501", named=named)
    with pytest.raises(SlurmError, match="denied"):
        cancelled(tmp_path)
    marks = run.path / "CANCELLED"
    assert (marks.read_text().split() if marks.exists() else []) == kept


def test_what_slurm_denies_is_reported_separately(tmp_path, monkeypatch):
    play(monkeypatch, tmp_path, code=1, error="error on job id 5_12: Access/permission denied")
    with pytest.raises(slurm.DeniedError, match="another user's: ask them") as error:
        slurm.cancel(["5_12", "5_1"])
    assert error.value.names("5_12")
    assert not error.value.names("5_1")


def test_a_cancelled_group_is_over(tmp_path, monkeypatch):
    group = Group(tmp_path / "r", "search.sbatch")
    PlayedSlurm(monkeypatch, False, j7="PENDING")
    (message,) = cancelled(tmp_path)
    assert "modtrain status run=r" in message
    assert group.state(SlurmJob("7", "FAILED")) == ("over", "")
