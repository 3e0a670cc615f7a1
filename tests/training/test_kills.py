"""Real processes, killed without warning, resume to the very weights of the run never killed."""

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import modtrain_command, run_modtrain
from tests.helpers.runs import last_step, losses_of
from tests.helpers.saved import assert_same_bits, newest_tensors

STEPS = 40


def overrides(tiny, tmp_path, name, *more):
    keep = [o for o in tiny if not o.startswith(("budget", "log", "checkpoint"))]
    return [
        *(*keep, f"budget.steps={STEPS}", "log.every=1", "log.tensorboard=false"),
        *("checkpoint.every=3", f"runs_dir={tmp_path}", f"name={name}", *more),
    ]


def kill_at(step: int, arguments: list[str], run: Path, signum: int, delay: float) -> int:
    """Start the run and end it by ``signum`` once ``step`` is recorded; return its exit code."""
    with subprocess.Popen(
        modtrain_command("train", *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=run.parent,
    ) as process:
        while process.poll() is None and not (last_step(run) >= step and has_torch(process)):
            time.sleep(0.002)
        time.sleep(delay)
        if process.poll() is None:
            os.kill(process.pid, signum)
        return process.wait()


def has_torch(process: subprocess.Popen) -> bool:
    """Whether the process has come to the import of torch, which takes seconds."""
    with suppress(OSError):
        return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
    return False


def check_kills(tiny, tmp_path, kills, *more):
    done = run_modtrain("train", *overrides(tiny, tmp_path, "whole", *more), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    draw = random.Random(3)
    arguments, run = overrides(tiny, tmp_path, "cut", *more), tmp_path / "cut"
    killed = 0
    for number in range(kills):
        # Spread over the run; a kill while a checkpoint is written, or before the first, included.
        step = 1 + round(number * (STEPS - 4) / kills)
        code = kill_at(step, arguments, run, signal.SIGKILL, draw.uniform(0, 0.05))
        killed += code == -signal.SIGKILL
    assert killed == kills
    done = run_modtrain("train", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole, resumed = (newest_tensors(tmp_path / name, STEPS) for name in ("whole", "cut"))
    assert_same_bits(whole, resumed)
    assert list(losses_of(run)) == list(range(1, STEPS + 1))


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("compiled", [False, True])
def test_twelve_kills_change_nothing(tiny, tmp_path, compiled):
    check_kills(tiny, tmp_path, 12, f"compile={str(compiled).lower()}")


@pytest.mark.slow
def test_one_kill_changes_nothing(tiny, tmp_path):
    check_kills(tiny, tmp_path, 1)


@pytest.mark.nightly
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_at_any_moment_ends_unfinished_and_is_resumed(tiny, tmp_path, signum, code):
    arguments, run = overrides(tiny, tmp_path, "cut"), tmp_path / "cut"
    assert kill_at(0, arguments, run, signum, 0.0) == code  # during the imports
    assert kill_at(5, arguments, run, signum, 0.0) == code
    assert not (tmp_path / "cut/COMPLETED").exists()
    done = run_modtrain("train", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resumes from step" in done.stdout
