"""Records on Weights & Biases, offline: nothing is sent."""

import json
import struct
from multiprocessing import get_context

import pytest
import torch
import wandb
from wandb.proto import wandb_internal_pb2

from modtrain.common.errors import TrainingError
from modtrain.training.config import LogConfig, TrainConfig
from modtrain.training.plan import TrainingPlan
from modtrain.training.run_directory import RunDirectory
from modtrain.training.schedules import CapacityStage
from modtrain.training.wandb_writer import WandbWriter, _run_id


@pytest.fixture(autouse=True)
def _fresh_settings():
    """Start each test with a library that has read no environment yet."""
    yield
    wandb.teardown()


# A TFLOP a step.
PLAN = TrainingPlan(
    seq_len=10, sequences_per_step=4, accumulate=1, stages=(CapacityStage(0, 9, (), 1e12 / 40),)
)
CONFIG = TrainConfig(name="sweep/one", log=LogConfig(wandb=True, wandb_project="depth"))


def records(path):
    """The records of an offline run's file, in order.

    After a header of 7 bytes, a LevelDB log: blocks of 32 KiB; each piece has a checksum (4 bytes),
    its length (2) and kind (1), and a record ends with a piece of kind 1 (whole) or 4 (last).
    """
    content, place, parsed, piece = path.read_bytes(), 7, [], b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        piece += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(piece)
            parsed.append(record)
            piece = b""
    return parsed


def history(parsed):
    rows = [r.history.item for r in parsed if r.WhichOneof("record_type") == "history"]
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row}
        for row in rows
    ]


def write_three_steps(path, start):
    writer = WandbWriter(RunDirectory(path), CONFIG, PLAN)
    for step in (start + 1, start + 2, start + 3):
        writer.write(step, {"loss": 1 / step})
    writer.add_image(step, "router/chosen", torch.zeros(8, 4, 3, dtype=torch.uint8))
    writer.add_histogram(step, "scores/layer_01", torch.arange(4.0))
    writer.close()


@pytest.mark.slow
def test_a_run_has_one_id_over_resumes_and_the_axes_of_the_other_records(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start in (0, 2):
        # A process of its own, as a resume has: within one, the service of wandb may still be at
        # closing the first stream of an id when it opens the second, and closes both.
        process = get_context("spawn").Process(target=write_three_steps, args=(tmp_path, start))
        process.start()
        process.join()
        assert process.exitcode == 0
    files = sorted(
        tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime
    )
    parsed = [records(path) for path in files]
    starts = [
        record.run
        for of_one in parsed
        for record in of_one
        if record.WhichOneof("record_type") == "run"
    ]
    run_id = (tmp_path / "wandb_id").read_text().strip()
    assert {start.run_id for start in starts} == {run_id}
    assert {(start.project, start.display_name) for start in starts} == {("depth", "sweep/one")}
    losses = [[row for row in history(of_one) if "loss" in row] for of_one in parsed]
    assert [[row["step"] for row in of_one] for of_one in losses] == [[1, 2, 3], [3, 4, 5]]
    for row in losses[0]:
        assert (row["tokens"], row["TFLOPs"]) == (40 * row["step"], row["step"])
        assert row["loss"] == 1 / row["step"]
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/router/*.png"))


@pytest.mark.slow
def test_without_a_key_the_error_names_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(TrainingError, match="WANDB_MODE=offline"):
        WandbWriter(RunDirectory(tmp_path), CONFIG, PLAN)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"../x\n", b"a" * 1000])
def test_a_damaged_id_is_set_aside(tmp_path, content):
    path = tmp_path / "wandb_id"
    path.write_bytes(content)
    assert _run_id(path) == _run_id(path) == path.read_text().strip()
    assert (tmp_path / "damaged-wandb_id").read_bytes() == content


def test_a_missing_package_is_a_problem_of_the_configuration(monkeypatch):
    monkeypatch.setattr("modtrain.training.config.find_spec", lambda _name: None)
    assert [p.key for p in CONFIG.log.problems("log")] == ["log.wandb"]
    assert LogConfig().problems("log") == []
