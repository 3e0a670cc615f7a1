"""A run whose checkpoints or configuration are gone is not taken for a new one."""

import json
import shutil

import pytest

from modtrain.checkpoint.reading import read_extra_state
from modtrain.cli.compose import compose
from modtrain.common.errors import CheckpointError, OtherRunError
from modtrain.training.metrics_log import read_metrics
from modtrain.training.run import train
from modtrain.training.run_directory import RunDirectory
from tests.helpers.runs import losses_of, stopping
from tests.helpers.saved import assert_same_bits, newest_weights

pytestmark = pytest.mark.usefixtures("no_stop_request")


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A complete run, and the same one stopped at its sixth step, which no test changes."""
    folder = tmp_path_factory.mktemp("runs")

    def start(name):
        return train(compose("train", [*tiny, f"runs_dir={folder}", f"name={name}"])).run

    complete = start("complete")
    with stopping(5):
        stopped = start("run")
    return complete, stopped


@pytest.fixture
def start(tiny, tmp_path, runs):
    """Start a copy of the stopped run, after ``damage`` was done to it."""

    def run(damage, *more):
        copy = RunDirectory(tmp_path / "run")
        if not copy.path.exists():
            shutil.copytree(runs[1].path, copy.path)
        damage(copy)
        return train(compose("train", [*tiny, f"runs_dir={tmp_path}", "name=run", *more]))

    return run


def remove_checkpoints(run):
    shutil.rmtree(run.checkpoints)


def remove_each_checkpoint(run):
    for path in run.checkpoints.iterdir():
        shutil.rmtree(path)


def remove_checkpoints_of_an_earlier_version(run):
    run.saved_step.unlink()
    remove_checkpoints(run)


def nothing(_run):
    pass


@pytest.mark.parametrize(
    "damage",
    [remove_checkpoints, remove_each_checkpoint, remove_checkpoints_of_an_earlier_version],
)
def test_lost_checkpoints_stop_a_start_that_would_overwrite_the_records(
    start, runs, damage, tmp_path
):
    for act in (damage, nothing):
        with pytest.raises(CheckpointError, match=r"no checkpoint, but(.|\n)*resume=fresh"):
            start(act)
    for name in ("metrics.jsonl", "config.yaml"):
        assert (tmp_path / "run" / name).read_text() == (runs[1].path / name).read_text()


def test_fresh_starts_from_the_first_step_and_keeps_the_old_records(start, runs):
    complete, stopped = runs
    with stopping(5):
        outcome = start(remove_checkpoints, "resume=fresh")
    run = outcome.run
    assert (run.path / "before-1/metrics.jsonl").read_text() == stopped.metrics.read_text()
    assert [record["step"] for record in read_metrics(run.metrics)][:1] == [2]
    # As in a job that is requeued with the same command: what is there now is resumed.
    assert start(nothing, "resume=fresh").status == "complete"
    assert not (run.path / "before-2").exists()
    assert_same_bits(newest_weights(complete.path), newest_weights(run.path))
    assert losses_of(run.path).keys() == losses_of(complete.path).keys()


def test_a_run_that_never_saved_starts_again(start):
    def never_saved(run):
        run.saved_step.unlink()
        remove_each_checkpoint(run)

    assert start(never_saved).status == "complete"


def test_a_lost_configuration_comes_back_from_the_checkpoint(start, runs, capsys):
    def lose(run):
        run.config.unlink()

    with pytest.raises(OtherRunError, match=r"optimizer\.lr: 0\.001 in the run, 0\.05 now"):
        start(lose, "optimizer.lr=0.05", "seed=7")
    outcome = start(lose)
    assert "config.yaml was missing: restored from the checkpoint of step 6" in " ".join(
        capsys.readouterr().out.split()
    )
    assert outcome.status == "complete"
    assert_same_bits(newest_weights(runs[0].path), newest_weights(outcome.run.path))
    assert len(json.loads(outcome.run.manifest.read_text())["starts"]) == 2


def test_an_edited_configuration_is_not_the_checkpoints(start):
    def edit(run):
        text = run.config.read_text()
        assert "lr: 0.001\n" in text
        run.config.write_text(text.replace("lr: 0.001\n", "lr: 0.05\n"))

    with pytest.raises(OtherRunError, match=r"optimizer\.lr: 0\.001 in the checkpoint, 0\.05 now"):
        start(edit, "optimizer.lr=0.05")


def test_without_any_record_of_the_configuration_nothing_resumes(start, monkeypatch):
    def without_config(path):
        return {k: v for k, v in read_extra_state(path).items() if k != "config"}

    monkeypatch.setattr("modtrain.training.lost_records.read_extra_state", without_config)
    with pytest.raises(CheckpointError, match=r"says what it was(.|\n)*command\.txt"):
        start(lambda run: run.config.unlink())


def test_resume_is_one_of_two_words(tiny):
    config = compose("train", [*tiny, "name=r", "resume=never"])
    assert [problem.key for problem in config.problems()] == ["resume"]
