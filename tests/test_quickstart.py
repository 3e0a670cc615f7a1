"""The first thing a newcomer does, for real: interrupted, resumed, and started once more."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modtrain.training.metrics_log import read_metrics

ROOT = Path(__file__).parents[1]
COMMAND = "make quickstart"


def start(folder: Path, log: Path) -> subprocess.Popen:
    # Under `make test-slow` an inner make would report the folders that it enters and leaves; and a
    # newcomer has not set torch to use a single thread.
    inner = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "OMP_NUM_THREADS"}
    outside = {k: v for k, v in os.environ.items() if k not in inner}
    with log.open("w") as output:
        return subprocess.Popen(
            COMMAND.split(),
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**outside, "COLUMNS": "200"},
        )


def steps(folder: Path, arm: str) -> list[int]:
    records = read_metrics(folder / f"runs/quickstart/{arm}/metrics.jsonl")
    return [r["step"] for r in records if "loss" in r]


@pytest.mark.nightly
@pytest.mark.timeout(2100)
def test_make_quickstart(tmp_path):
    folder = tmp_path / "checkout"
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    os.utime(ROOT / ".venv/.installed")

    # Killed in the first arm; then Ctrl-C in the second, as a terminal sends it.
    for arm, signum in (("dense", signal.SIGKILL), ("mod", signal.SIGINT)):
        process = start(folder, tmp_path / f"{arm}.log")
        while process.poll() is None and len(steps(folder, arm)) < 8:
            time.sleep(0.2)
        os.killpg(process.pid, signum)
        assert process.wait(timeout=60) != 0
    process = start(folder, tmp_path / "last.log")
    assert process.wait(timeout=1800) == 0
    shown = (tmp_path / "last.log").read_text()
    assert "resumes from step" in shown
    for expected in ("causal loss", "top-k loss, not causal", "forward FLOPs a token", "step time"):
        assert expected in shown
    assert re.search(r"mod (beats|loses to|equals) dense", shown)
    (picture,) = re.findall(r"^picture: (.*)$", shown, re.MULTILINE)
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert "tensorboard --logdir runs/quickstart" in shown
    dense, routed = shown.split("dense goes on:\n")[1].split("MoD goes on")
    assert dense.startswith("My fellow citizens")
    assert len(re.findall("[₀₁₂₃₄]", routed)) > 40 > len(re.findall("[₀₁₂₃₄]", dense))
    for arm in ("dense", "mod"):
        assert steps(folder, arm) == sorted(set(steps(folder, arm)))

    before = {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*") if p.is_file()}
    process = start(folder, tmp_path / "again.log")
    assert process.wait(timeout=120) == 0
    assert "is complete: nothing was trained" in (tmp_path / "again.log").read_text()
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*") if p.is_file()}
