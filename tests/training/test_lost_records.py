"""A run whose checkpoints or configuration are gone is not taken for a new one."""

import dataclasses
import json
import os
import shutil

import pytest

from modtrain.checkpoint.reading import read_extra_state
from modtrain.cli.compose import compose
from modtrain.common.errors import CheckpointError, OtherRunError
from modtrain.data.stream.index import ShardIndex
from modtrain.distributed.process_group import ONE_PROCESS
from modtrain.training.config import TrainConfig
from modtrain.training.lost_records import settle_records
from modtrain.training.metrics_log import read_metrics
from modtrain.training.run import train
from modtrain.training.run_directory import RunDirectory
from modtrain.training.spikes.journal import SpikeJournal
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


def lose_the_configuration_too(run):
    remove_checkpoints_of_an_earlier_version(run)
    run.config.unlink()


def damage_the_saved_step(run):
    remove_each_checkpoint(run)
    link_the_saved_step(run)


@pytest.mark.parametrize("damage", [lose_the_configuration_too, damage_the_saved_step])
def test_two_losses_at_once_are_no_new_run(tmp_path, damage):
    run = RunDirectory(tmp_path)
    run.checkpoints.mkdir()
    run.saved_step.write_text("6\n")
    run.config.touch()
    run.metrics.write_text('{"step": 2}\n')
    damage(run)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint, but(.|\n)*resume=fresh"):
            settle_records(run, TrainConfig())
    (tmp_path / "eval-000000002.json").touch()
    settle_records(run, TrainConfig(resume="fresh"))
    kept = {path.name for path in (tmp_path / "before-1").iterdir()}
    assert {"metrics.jsonl", "eval-000000002.json"} <= kept
    assert not run.metrics.exists()


@pytest.mark.slow
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


@pytest.mark.parametrize("truncates", [False, True])
def test_a_run_that_never_saved_starts_again(start, truncates):
    def never_saved(run):
        run.saved_step.unlink()
        remove_each_checkpoint(run)
        if truncates:
            truncate_the_manifest(run)

    run = start(never_saved).run
    assert run.is_complete
    assert len(run.read_manifest()["starts"]) == 2 - truncates


@pytest.mark.slow
def test_a_lost_configuration_comes_back_from_the_checkpoint(start, runs, capsys):
    def lose(run):
        run.config.unlink()

    with pytest.raises(OtherRunError, match=r"optimizer\.lr: 0\.001 in the run, 0\.05 now"):
        start(lose, "optimizer.lr=0.05", "seed=7")
    outcome = start(lose)
    assert "config.yaml was missing: restored from the newest checkpoint" in " ".join(
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


def damage_a_byte(run):
    text = run.metrics.read_bytes()
    run.metrics.write_bytes(text[:20] + b"\xff" + text[20:])


def damage_a_line(run):
    first, *rest = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join([first, "null\n", '{"loss": 1}\n', *rest]))


def make_metrics_a_pipe(run):
    run.metrics.unlink()
    os.mkfifo(run.metrics)


def truncate_the_manifest(run):
    run.manifest.write_bytes(run.manifest.read_bytes()[:100])


def forge_the_manifest(run):
    run.manifest.write_text('{"data_fingerprint": "f", "starts": null}')


def add_events(run):
    (run.path / "events.jsonl").write_text('null\n{"step": 3}\n')


def nest_a_checkpoints_manifest(run):
    newest = max(run.checkpoints.iterdir())
    (newest / "manifest.json").write_text("[" * 200_000)


def link_the_saved_step(run):
    run.saved_step.unlink()
    run.saved_step.symlink_to("/dev/zero")


@pytest.mark.slow
@pytest.mark.on_commit(3)
@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (damage_a_line, "damaged-metrics.jsonl"),
        (truncate_the_manifest, "damaged-manifest.json"),
        (nest_a_checkpoints_manifest, "checkpoints/damaged-step-000000006"),
        (make_metrics_a_pipe, "damaged-metrics.jsonl"),
        (damage_a_byte, "damaged-metrics.jsonl"),
        (forge_the_manifest, "damaged-manifest.json"),
        (add_events, "damaged-events.jsonl"),
        (link_the_saved_step, "checkpoints"),
    ],
)
def test_damage_to_what_only_reports_a_run_does_not_block_it(start, runs, damage, kept, caplog):
    outcome = start(damage)
    assert outcome.status == "complete"
    assert_same_bits(newest_weights(runs[0].path), newest_weights(outcome.run.path))
    assert (outcome.run.path / kept).exists()
    if kept != "checkpoints":
        assert f"kept as {kept.removeprefix('checkpoints/')}" in caplog.text
    assert all(line.startswith("{") for line in outcome.run.metrics.read_text().splitlines())


def test_other_data_are_seen_without_the_manifest(start, monkeypatch):
    """The file would say that the run was trained on the data that are there now."""
    load = ShardIndex.load

    def other(*arguments):
        index = load(*arguments)
        summary = dataclasses.replace(index.summary, fingerprint="another")
        return dataclasses.replace(index, summary=summary)

    with monkeypatch.context() as patch:
        patch.setattr(ShardIndex, "load", other)
        with pytest.raises(CheckpointError, match="trained on other data"):
            start(lambda run: run.manifest.unlink())
    assert start(nothing).status == "complete"


@pytest.mark.parametrize(
    "content",
    [
        '{"left_out": [[80, 70]], "rollbacks": 1}',
        '{"left_out": [[8, 8]], "rollbacks": 1}',
        '{"left_out": [[-4, 8]], "rollbacks": 1}',
        '{"left_out": [[40, 48], [16, 20]], "rollbacks": 2}',
        '{"left_out": [[16, 24], [20, 28]], "rollbacks": 2}',
        '{"left_out": [[16.5, 24]], "rollbacks": 1}',
        '{"left_out": [[16, 20], [24, 28]], "rollbacks": 1}',
        '{"left_out": [[96, 109]], "rollbacks": 1}',
        "[" * 200_000,
        "null",
    ],
)
def test_samples_that_are_left_out_are_in_order_or_refused(tmp_path, content):
    (tmp_path / "left_out.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"left_out.json cannot be read(.|\n)*restore it"):
        SpikeJournal(RunDirectory(tmp_path), ONE_PROCESS, num_samples=96)


def test_samples_up_to_the_end_of_the_run_may_be_left_out(tmp_path):
    """What is left out makes the stream longer."""
    (tmp_path / "left_out.json").write_text('{"left_out": [[90, 98], [100, 104]], "rollbacks": 3}')
    journal = SpikeJournal(RunDirectory(tmp_path), ONE_PROCESS, num_samples=96)
    assert (journal.skipped_samples, journal.rollbacks) == ([(90, 98), (100, 104)], 3)


@pytest.mark.parametrize("name", ["result.json", "manifest.json", "config.yaml"])
@pytest.mark.parametrize("content", ["[" * 200_000, "", "null", "a: &x [1]\nb: [*x, *x]"])
def test_a_damaged_record_that_is_asked_for_is_named_with_its_remedy(tmp_path, name, content):
    run = RunDirectory(tmp_path)
    reads = {"result": run.read_result, "manifest": run.read_manifest, "config": run.read_config}
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{name}.*\n*remedy: "):
        reads[name.split(".")[0]]()


def test_a_mark_without_a_result_is_no_end(start):
    assert start(lambda run: run.completed_mark.touch()).status == "complete"
