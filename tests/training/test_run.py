"""Whole runs in this process, and what they leave behind."""

import json
import math
import os
import pty
import shutil
import signal
import subprocess
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import modtrain
from modtrain.checkpoint.layout import checkpoint_path
from modtrain.checkpoint.parts import Staging
from modtrain.checkpoint.recovery import latest, whole_checkpoints
from modtrain.cli.compose import compose
from modtrain.common.errors import CheckpointError, OtherRunError, TrainingError
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.models.transformer import Transformer
from modtrain.training.callbacks import metrics as metrics_callback
from modtrain.training.metrics_log import MetricsLog, read_metrics
from modtrain.training.run import train
from modtrain.training.run_directory import RunDirectory, code_version
from modtrain.training.schedule_config import ScheduleConfig
from modtrain.training.schedules import lr_factor
from modtrain.training.stop_signal import STOP
from tests.conftest import modtrain_command
from tests.helpers.runs import before_step, losses_of, request_stop, stopping
from tests.helpers.saved import assert_same_bits, newest_weights, tensors_of

pytestmark = pytest.mark.usefixtures("no_stop_request")

COSINE = ScheduleConfig(warmup=0.02, final=0.1)


@pytest.fixture
def start(tiny, tmp_path):
    def run(name="run", *more):
        return train(compose("train", [*tiny, f"name={name}", f"runs_dir={tmp_path}", *more]))

    return run


@pytest.fixture(scope="module")
def complete(tiny, tmp_path_factory):
    """A complete run, whose files no test changes."""
    return train(
        compose("train", [*tiny, f"runs_dir={tmp_path_factory.mktemp('runs')}", "name=run"])
    ).run


@pytest.fixture
def copied(complete, tmp_path):
    """A copy of it, which `start` starts again."""
    shutil.copytree(complete.path, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    return newest_weights(run.path)


def test_a_run_leaves_what_it_should_and_a_second_start_does_nothing(start):
    outcome = start()
    run = outcome.run
    assert outcome.status == "complete"
    assert {p.name for p in run.path.iterdir() if p.name != ".lock"} == {
        *("config.yaml", "manifest.json", "command.txt", "checkpoints", "tensorboard", "logs"),
        *("metrics.jsonl", "result.json", "saved_step", "usage.json", "COMPLETED"),
    }
    assert [s for s, _ in whole_checkpoints(run.checkpoints)] == [8, 12]
    result = json.loads(run.result.read_text())
    assert result["steps"] == 12
    assert result["tokens"] == 12 * 256
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file()}
    assert start().status == "already complete"
    assert before == {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_slow_copy_of_a_save_has_the_weights_of_its_step(start, monkeypatch):
    more = ("budget.steps=3", "checkpoint.every=1", "checkpoint.keep_last=3")
    expected = start("blocking", *more, "checkpoint.background=false").run
    copy = Staging.copy

    def slow(*arguments):
        time.sleep(0.5)
        return copy(*arguments)

    monkeypatch.setattr(Staging, "copy", slow)
    run = start("slow", *more).run
    for step in (1, 2, 3):
        assert_same_bits(
            *(tensors_of(checkpoint_path(r.checkpoints, step)) for r in (run, expected))
        )


def test_metrics_are_recorded_once_a_step_with_tokens_and_flops(complete):
    records = read_metrics(complete.metrics)
    training = [r for r in records if "loss" in r]
    assert [r["step"] for r in training] == [2, 4, 6, 8, 10, 12]
    for record in training:
        assert record["tokens"] == record["step"] * 256
        assert record["flops"] / record["step"] == training[0]["flops"] / 2
        assert record["lr"] == pytest.approx(1e-3 * lr_factor(COSINE, record["step"] - 1, 12))
        assert {"lr", "grad_norm", "throughput/tokens_per_second"} <= record.keys()
        assert "throughput/mfu" not in record  # the CPU's peak is not known
        assert math.isfinite(record["loss"])
        for layer in ("01", "03"):
            assert 0 <= record[f"router/layer_{layer}/position_entropy"] <= 1
            assert 0 < record[f"router/layer_{layer}/update_ratio"] < 1
            assert math.isfinite(record[f"router/layer_{layer}/gate_mean"])
        assert 0 <= record["router/layer_03/chosen_again"] <= 1
    held_out = [r for r in records if "held_out/causal_loss" in r]
    assert [r["step"] for r in held_out] == [6, 12]
    assert "held_out/top_k_loss (not causal)" in held_out[0]
    # What the routed layers are worth is measured at the end.
    worth = ["held_out/layer_01/worth", "held_out/layer_03/worth", "held_out/routed_worth"]
    assert [[key in record for key in worth] for record in held_out] == [[False] * 3, [True] * 3]


def test_tensorboard_shows_the_loss_on_three_axes_and_the_routing(complete):
    events = EventAccumulator(str(complete.tensorboard)).Reload()
    tags = events.Tags()
    flops = read_metrics(complete.metrics)[-1]["flops"]
    ends = {"main/": 12, "main_by_tokens/": 12 * 256, "main_by_MFLOPs/": round(flops / 1e6)}
    for group, last in ends.items():
        for loss in ("loss", "causal_loss", "top_k_loss_not_causal"):
            assert events.Scalars(group + loss)[-1].step == last
    assert sorted(tags["scalars"])[0].startswith("main")
    assert tags["images"] == ["routing/layer x token"]
    assert set(tags["histograms"]) == {"scores/layer_01", "scores/layer_03"}
    # One entry on the page: no folder below has events of its own.
    assert not [path for path in complete.tensorboard.iterdir() if path.is_dir()]


def test_a_dense_run_has_one_held_out_loss(start):
    records = read_metrics(start("dense", "model.pattern=dense").run.metrics)
    assert not any("top_k" in key or "router" in key for r in records for key in r)


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize("step", [0, 5, 7])
def test_a_signal_saves_the_step_and_the_next_start_ends_bitwise_equal(start, complete, step):
    with stopping(step):
        stopped = start("cut")
    assert stopped.status == "stopped"
    assert stopped.exit_code == 75
    assert not stopped.run.is_complete
    assert latest(stopped.run.checkpoints)[0] == step + 1
    resumed = start("cut")
    assert resumed.status == "complete"
    assert_same_bits(weights(complete), weights(resumed.run))
    keep = ("step", "loss", "grad_norm", "lr", "held_out/causal_loss")
    shown = [
        [{k: r[k] for k in keep if k in r} for r in read_metrics(run.metrics)]
        for run in (complete, resumed.run)
    ]
    # The mean over a record's steps begins anew at a resume; all the rest is equal.
    for record in (*shown[0], *shown[1]):
        record.pop("loss", None)
    assert shown[0] == shown[1]


@pytest.mark.slow
def test_a_signal_while_lightning_sets_up_is_not_taken_for_an_end(start, monkeypatch):
    original = TokenDataModule.train_dataloader

    def train_dataloader(data):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(data)

    STOP.install()
    with monkeypatch.context() as patch:
        patch.setattr(TokenDataModule, "train_dataloader", train_dataloader)
        stopped = start()
    assert (stopped.status, stopped.exit_code) == ("stopped", 75)
    assert not stopped.run.is_complete
    STOP.signum = None
    assert start().status == "complete"


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(
    start, complete, copied
):
    newest = latest(copied.checkpoints)[1]
    victim = max(newest.glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-3])
    copied.completed_mark.unlink()
    assert start().status == "complete"
    assert latest(copied.checkpoints) == (12, newest)
    assert newest.with_name(f"damaged-{newest.name}").is_dir()
    assert list(losses_of(copied.path)) == [2, 4, 6, 8, 10, 12]
    assert_same_bits(weights(complete), weights(copied))


@pytest.mark.parametrize(
    ("more", "is_free"),
    [
        ((), True),
        (("model.experts.count=4", "model.experts.balance=bias"), True),
        (("model.experts.count=4",), False),
        (("model.router.choice=token",), False),
        (("model.router.choice=token", "model.pattern=dense"), True),
    ],
)
def test_micro_batches_keep_their_size_where_it_is_learned_from(tiny, tmp_path, more, is_free):
    """With experts the gradient of the balance loss is another one, by a quarter of its size."""
    lines = [*tiny, "name=r", f"runs_dir={tmp_path}", *more, "batch.micro_batch_size="]
    run = RunDirectory(tmp_path / "r")
    run.start(compose("train", [*lines[:-1], lines[-1] + "4"]), "f", "cpu")
    smaller = compose("train", [*lines[:-1], lines[-1] + "2"])
    if is_free:
        run.check_same(smaller)
    else:
        with pytest.raises(OtherRunError, match=r"batch\.micro_batch_size: 4 in the run, 2 now"):
            run.check_same(smaller)


@pytest.mark.usefixtures("copied")
def test_a_changed_configuration_names_the_keys_and_stops(start):
    with pytest.raises(CheckpointError) as error:
        start("run", "optimizer.lr=0.5", "model.capacity=0.25", "log.every=7", "eval.every=3")
    assert "optimizer.lr: 0.001 in the run, 0.5 now" in str(error.value)
    assert "model.capacity: 0.125 in the run, 0.25 now" in str(error.value)
    assert "log.every" not in str(error.value)
    assert "eval.every" not in str(error.value)
    assert "remedy" in str(error.value)


@pytest.mark.usefixtures("no_lock_wait")
def test_two_processes_cannot_share_a_run(start, tmp_path):
    with (
        RunDirectory(tmp_path / "run").locked(),
        pytest.raises(CheckpointError, match="in use by another process"),
    ):
        start()


def test_a_file_system_without_locks_is_named(start, no_locks):
    with pytest.raises(CheckpointError, match=r"No locks available.*a file system with flock"):
        start()


def test_a_difference_to_the_commit_may_be_in_any_encoding(tmp_path, monkeypatch):
    file = tmp_path / "modtrain/__init__.py"
    file.parent.mkdir()
    file.touch()
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    file.write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr(modtrain, "__file__", str(file))
    assert "+# caf" in code_version()["diff"]


def test_a_nan_stops_with_step_samples_and_checkpoint(start, monkeypatch, tmp_path):
    original = Transformer.forward
    calls = []

    def forward(model, *args, **kwargs):
        output = original(model, *args, **kwargs)
        if model.training:
            calls.append(1)
            if len(calls) == 11:  # two micro-batches a step: the sixth step
                return output._replace(loss=output.loss * float("nan"))
        return output

    monkeypatch.setattr(Transformer, "forward", forward)
    with pytest.raises(TrainingError) as error:
        start()
    message = str(error.value)
    assert "at step 6" in message
    assert "step-000000004" in message
    assert "samples are" in message
    # What came after the bad step is neither recorded nor saved.
    assert max(r["step"] for r in read_metrics(tmp_path / "run/metrics.jsonl")) == 4


def test_a_signal_after_a_bad_step_saves_nothing(start, tmp_path, monkeypatch):
    before_step(4, request_stop, monkeypatch.setattr)
    with pytest.raises(TrainingError, match="NaN or infinite at step"):
        start(
            *("bad", "optimizer.lr=1e30", "optimizer.grad_clip=null", "eval.every=null"),
            *("log.every=100", "checkpoint.every=100"),
        )
    assert latest(tmp_path / "bad" / "checkpoints") is None


def test_a_run_without_a_finite_loss_at_its_end_is_not_complete(start, monkeypatch, tmp_path):
    write = MetricsLog.write

    def lose(log, step, values):
        losses = {key: math.nan for key in values if key == "held_out/causal_loss"}
        write(log, step, values | losses)

    monkeypatch.setattr(MetricsLog, "write", lose)
    with pytest.raises(TrainingError, match=r"held_out/causal_loss is not finite(.|\n)*remedy"):
        start()
    run = RunDirectory(tmp_path / "run")
    assert not run.is_complete and not run.completed_mark.exists()

    def refuse(constant):
        raise AssertionError(constant)

    for line in run.metrics.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert "held_out/causal_loss" not in read_metrics(run.metrics)[-1]


def test_a_run_that_ended_between_its_last_checkpoint_and_its_mark_trains_no_further(
    start, complete, copied
):
    copied.completed_mark.unlink()
    assert start().status == "complete"
    assert_same_bits(weights(complete), weights(copied))
    assert copied.metrics.read_text() == complete.metrics.read_text()


def test_no_checkpoint_is_written_after_a_bad_step(start, tmp_path):
    with pytest.raises(TrainingError, match="none: the run had not saved yet"):
        start("bad", "optimizer.lr=1e30", "optimizer.grad_clip=null", "log.every=100")
    assert latest(tmp_path / "bad" / "checkpoints") is None


@pytest.mark.slow
def test_predictors_change_nothing_in_the_trunk_over_a_whole_run(start):
    """Clipping included: a common norm would couple them."""
    tight = "optimizer.grad_clip=0.01"
    with_predictor = weights(start("with", tight).run)
    without = weights(start("without", tight, "model.router.causal=[]").run)
    assert any("predictor" in key for key in with_predictor)
    assert all(torch.equal(with_predictor[key], without[key]) for key in without)


def test_utilisation_is_of_executed_flops(start, monkeypatch):
    monkeypatch.setattr(metrics_callback, "peak_flops", lambda *_: 1e12)
    run = start("run", "budget.steps=4", "eval.every=null").run
    records = [r for r in read_metrics(run.metrics) if "loss" in r]
    assert records
    for record in records:
        executed = record["flops"] / record["step"]
        achieved = executed / record["throughput/step_seconds"]
        assert record["throughput/mfu"] == pytest.approx(achieved / 1e12)


@pytest.mark.slow
def test_bf16_mixed_precision_keeps_its_weights_in_fp32(start):
    run = start("narrow", "precision=bf16").run
    wide = start("wide", "precision=fp32").run
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.float32}
    losses = [read_metrics(r.metrics)[-2]["loss"] for r in (run, wide)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.slow
def test_a_terminal_shows_a_bar(tiny, tmp_path):
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        modtrain_command("train", *tiny, "name=bar", f"runs_dir={tmp_path}"),
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "160", "TERM": "xterm"},
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 65536):
                shown += piece
        except OSError:  # how a terminal signals that the other side has closed
            pass
        assert process.wait() == 0
    text = shown.decode()
    for expected in ("bar", "━", "step 12/12", "loss", "tokens/s", "FLOPs", "left"):
        assert expected in text
