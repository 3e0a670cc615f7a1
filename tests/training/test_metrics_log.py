import csv
import io
import json
import math
import shutil
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modtrain.common.atomic_io import name_file
from modtrain.common.errors import TrainingError
from modtrain.models.config import ModelConfig
from modtrain.training.config import LogConfig, TrainConfig
from modtrain.training.metrics_log import MetricsLog, read_metrics
from modtrain.training.plan import TrainingPlan
from modtrain.training.run_directory import RunDirectory
from modtrain.training.schedules import CapacityStage

# A GFLOP a step.
PLAN = TrainingPlan(
    seq_len=10, sequences_per_step=4, accumulate=1, stages=(CapacityStage(0, 9, (), 1e9 / 40),)
)
CONFIG = TrainConfig(name="a", model=ModelConfig(num_layers=2, vocab_size=50))

NO_TENSORBOARD = LogConfig(tensorboard=False)


def write(run, start_step, last):
    log = MetricsLog(run, CONFIG, PLAN, start_step)
    for step in range(start_step + 1, last + 1):
        log.write(step, {"loss": float(step), "lr": 0.1})
    log.close()


@pytest.mark.parametrize("resumed_at", [0, 3])
def test_every_step_is_recorded_once_after_a_kill(tmp_path, resumed_at):
    run = RunDirectory(tmp_path)
    write(run, 0, last=5)
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by the kill
    time.sleep(1.1)  # event files are read in the order of the seconds in their names
    write(run, resumed_at, last=4)
    assert [r["step"] for r in read_metrics(run.metrics)] == [1, 2, 3, 4]
    for suffix, unit in (("", 1), ("_by_tokens", 40), ("_by_MFLOPs", 1000)):
        events = EventAccumulator(str(run.tensorboard)).Reload()
        steps = [e.step for e in events.Scalars(f"main{suffix}/loss")]
        assert steps == [unit * step for step in range(1, 5)]


def test_a_run_whose_events_an_earlier_version_wrote_has_its_records_here_too(tmp_path):
    run = RunDirectory(tmp_path)
    write(run, 0, last=4)
    shutil.rmtree(run.tensorboard)
    write(run, 4, last=5)
    events = EventAccumulator(str(run.tensorboard)).Reload()
    for tag in ("main/loss", "training/lr", "main/share_of_budget"):
        assert [e.step for e in events.Scalars(tag)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("starts", "begin", "steps", "gaps"),
    [
        # The lines at the end were not on the disk when the power was cut, some in the middle went.
        ([2, 2], 0, [2, 4, 10, 12], "4 and 10, 12 and 16"),
        ([2, 2], 0, [], "0 and 16"),
        ([2, 2], 0, range(2, 17, 2), ""),
        # Another interval at one start, the steps of a trunk, and a start that did not note it.
        ([2, 6], 0, [2, 4, 10, 12], ""),
        ([2, 2], 12, [14], ""),
        ([2, None], 0, [2], ""),
        ([1], 0, [4, 8, 12], ""),
    ],
)
def test_lost_records_are_reported(tmp_path, caplog, starts, begin, steps, gaps):
    run = RunDirectory(tmp_path)
    parent = {"parent": {"how": "branch", "step": begin}} if begin else {}
    manifest = {"data_fingerprint": "f", "starts": [{"log_every": n} for n in starts], **parent}
    run.manifest.write_text(json.dumps(manifest))
    run.metrics.write_text("".join(f'{{"step": {step}}}\n' for step in (*steps, 18)))
    if starts == [1]:
        # The file was restored, and has one start of two.
        run.config.write_text("log:\n  every: 4\n")
    MetricsLog(run, TrainConfig(log=NO_TENSORBOARD), PLAN, 16).close()
    expected = [f"{run.metrics} lacks records between steps {gaps}"] if gaps else []
    assert caplog.messages == expected


FULL = Path("/dev/full")


def test_a_full_disk_is_named_with_the_file_and_the_remedy(tmp_path):
    log = MetricsLog(RunDirectory(tmp_path), TrainConfig(log=NO_TENSORBOARD), PLAN, 0)
    log._file = FULL.open("wb")
    with pytest.raises(TrainingError, match=r"metrics\.jsonl cannot be.*No space(.|\n)*remedy"):
        log.write(1, {"loss": 1.0})
    log.close()


def test_tensorboard_on_a_full_disk_is_named(tmp_path):
    """Its thread meets the error, and the next record raises it."""
    run = RunDirectory(tmp_path)
    log = MetricsLog(run, CONFIG, PLAN, 0)
    (writer,) = log._writers
    writer._file.event_writer._async_writer._worker.exception = OSError(28, "No space left")
    with pytest.raises(OSError, match=f"No space left: '{run.tensorboard}'"):
        log.write(1, {"loss": 1.0})


def test_writing_to_a_full_disk_names_the_file():
    path = Path("/a/file")
    full = FULL.open("wb", buffering=0)
    with full, pytest.raises(OSError, match=f"No space.*{path}"), name_file(path):
        full.write(b"a")


def test_a_table_has_each_record_once_after_a_resume(tmp_path):
    """As `metrics.jsonl` has them, whatever a kill left, and with metrics that come later."""
    run, config = RunDirectory(tmp_path), TrainConfig(log=LogConfig(tensorboard=False, csv=True))
    log = MetricsLog(run, config, PLAN, 0)
    for step in range(1, 6):
        log.write(step, {"loss": 1 / step})
    log.close()
    with run.metrics_csv.open("a") as file:
        file.write("6,24")
    log = MetricsLog(run, config, PLAN, 3)
    log.write(4, {"loss": math.nan})
    log.write(4, {'held_out/"odd", loss': 0.5})
    log.write(5, {"loss": 0.2})
    log.close()
    rows = list(csv.DictReader(io.StringIO(run.metrics_csv.read_text())))
    kept = [{k: float(v) for k, v in row.items() if v} for row in rows]
    assert kept == read_metrics(run.metrics)
    assert [row["step"] for row in kept] == [1, 2, 3, 4, 4, 5]
    assert kept[0] == {"step": 1, "tokens": 40, "flops": 1e9, "loss": 1}
