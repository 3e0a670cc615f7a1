"""What a job's script hears of a run: how it ended, and whether it had the time to save."""

import os
import re
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import pytest

from modtrain.common.errors import (
    ConfigError,
    DataError,
    DivergedError,
    InUseError,
    NodeError,
    Problem,
    TrainingError,
)
from modtrain.training.hardware import ACCELERATOR, resolve_accelerator
from modtrain.training.outcome import OUTCOME, REQUIRED, report_outcome
from modtrain.training.stop_signal import StopRequest
from tests.conftest import modtrain_command
from tests.helpers.runs import last_step


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TrainingError("the loss\nis NaN"), 1),
        (DivergedError("the loss is NaN"), 65),
        (ConfigError([Problem("a", 1, "is wrong", "mend it")]), 2),
        (ImportError("no hydra", name="hydra.core"), 69),
        (ImportError("no modtrain", name="modtrain.cli"), 69),
        # No node may have what is optional.
        (ImportError("no wandb", name="wandb"), 1),
        (ImportError("this logger needs wandb"), 1),
        (InUseError("it is in use"), 73),
        (KeyboardInterrupt(), 130),
        (SystemExit(3), 3),
        (RuntimeError("no"), 1),
    ],
)
def test_an_error_is_reported_and_raised(error, code, tmp_path, monkeypatch):
    monkeypatch.setenv(OUTCOME, str(tmp_path))
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    with pytest.raises(type(error)), report_outcome():
        # What it starts does not report for it.
        assert OUTCOME not in os.environ
        assert (tmp_path / "rank-0").read_text() == "running\nnode7\n\n"
        raise error
    first, second, third = (tmp_path / "rank-0").read_text().splitlines()
    assert (first, second) == (str(code), "node7")
    assert third.startswith(type(error).__name__)
    assert " ".join(str(error).split()) in third


@pytest.mark.parametrize(
    ("package", "body", "code"),
    [
        # As numpy says that its binaries do not fit.
        ("numpy", "raise ImportError('rebuild it')", 69),
        ("torch", "import nowhere_to_be_found", 69),
        # As a logger of Lightning says that its service is not installed.
        ("lightning", "def make(): raise ImportError('install it')\nmake()", 1),
        ("modtrain", "import nowhere_to_be_found", 1),
        ("wandb", "raise ImportError('rebuild it')", 1),
    ],
)
def test_a_broken_package_is_the_nodes_if_modtrain_requires_it(
    package, body, code, tmp_path, monkeypatch
):
    monkeypatch.setenv(OUTCOME, str(tmp_path))
    with pytest.raises(ImportError), report_outcome():
        exec(compile(body, "it", "exec"), {"__name__": f"{package}.part"})
    assert (tmp_path / "rank-0").read_text().startswith(f"{code}\n")


def test_what_is_required_is_what_the_project_depends_on():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = [re.split("[^A-Za-z0-9._-]", text)[0] for text in project["dependencies"]]
    imported = {"hydra-core": "hydra", "hydra-joblib-launcher": "hydra_plugins", "pyyaml": "yaml"}
    assert sorted(REQUIRED) == sorted(imported.get(name, name) for name in names)


def test_a_name_of_any_bytes_in_the_reason_hides_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv(OUTCOME, str(tmp_path))
    with pytest.raises(DataError), report_outcome():
        raise DataError(f"{os.fsdecode(b'/data/caf' + bytes([0xE9]))}: missing")
    assert (tmp_path / "rank-0").read_text().splitlines()[2] == "DataError: /data/caf?: missing"


def test_every_rank_reports(tmp_path, monkeypatch):
    for rank in ("0", "1"):
        monkeypatch.setenv(OUTCOME, str(tmp_path))
        monkeypatch.setenv("RANK", rank)
        with report_outcome() as outcome:
            outcome.exit_code = 75
        assert (tmp_path / f"rank-{rank}").read_text().startswith("75\n")


def test_the_beginning_and_the_end_of_a_long_reason_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv(OUTCOME, str(tmp_path))
    with pytest.raises(ValueError, match="first"), report_outcome():
        raise ValueError("first" + "x" * 10_000 + "last")
    reason = (tmp_path / "rank-0").read_text().splitlines()[2]
    assert reason.startswith("ValueError: first")
    assert reason.endswith("last")
    assert 2000 < len(reason) < 5000


def test_a_removed_directory_breaks_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(OUTCOME, str(tmp_path / "gone"))
    with report_outcome():
        pass


@pytest.mark.parametrize("accelerator", ["auto", "cuda"])
def test_a_job_with_gpus_does_not_train_without(accelerator, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv(ACCELERATOR, "cuda")
    with pytest.raises(NodeError, match="has no cuda device"):
        resolve_accelerator(accelerator)
    assert resolve_accelerator("cpu") == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert resolve_accelerator(accelerator) == "cuda"


@pytest.mark.parametrize(
    ("signum", "seconds"),
    [(signal.SIGUSR1, 300), (signal.SIGTERM, 30), (signal.SIGINT, None), (None, None)],
)
def test_each_signal_leaves_its_own_time(signum, seconds, monkeypatch):
    monkeypatch.setenv("MODTRAIN_LEAD", "300")
    monkeypatch.setenv("MODTRAIN_GRACE", "30")
    stop = StopRequest()
    if signum is not None:
        stop._handle(signum, None)
    left = stop.seconds_left
    assert left == (None if seconds is None else pytest.approx(seconds, abs=5))
    if left is not None:
        time.sleep(0.01)
        assert stop.seconds_left < left
    monkeypatch.delenv("MODTRAIN_LEAD")
    monkeypatch.setenv("MODTRAIN_GRACE", "soon")
    assert stop.seconds_left is None


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize("lead", ["0", "300"])
def test_a_save_that_would_not_come_to_its_end_is_not_begun(lead, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("MODTRAIN_LEAD", lead)
    monkeypatch.setenv(OUTCOME, str(tmp_path))
    keep = [word for word in tiny if not word.startswith(("budget", "checkpoint", "log"))]
    words = ["name=x", *keep, "budget.steps=100000", "checkpoint.every=7", "log.every=1"]
    command = modtrain_command("train", *words, "log.tensorboard=false", "log.progress=false")
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as run:
        while last_step(tmp_path / "runs/x") < 30:
            assert run.poll() is None
            time.sleep(0.02)
        run.send_signal(signal.SIGUSR1)
        error = run.communicate(timeout=60)[1]
    assert run.returncode == 75
    assert (tmp_path / "rank-0").read_text().startswith("75\n")
    newest = max(path.name for path in (tmp_path / "runs/x/checkpoints").glob("step-*"))
    last = last_step(tmp_path / "runs/x")
    if lead == "0":
        assert "is not saved: a save takes" in error
        assert int(newest.removeprefix("step-")) % 7 == 0
    else:
        assert "is not saved" not in error
        assert int(newest.removeprefix("step-")) == last
