"""A wheel installed into an empty environment works away from the checkout."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import make_corpus

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_installed_modtrain_prepares_trains_and_evaluates(tmp_path):
    wheels = tmp_path / "wheels"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(wheels), str(ROOT)], check=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    shipped = {p.relative_to(ROOT).as_posix() for p in (ROOT / "conf").rglob("*.yaml")}
    assert {f"modtrain/{name}" for name in shipped} <= set(names)
    assert not [n for n in names if n.startswith(("tests", "benchmarks", "conf"))]

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    own = [environment / "bin/pip", "--quiet", "--disable-pip-version-check"]
    constraints = ["-c", ROOT / "constraints.txt"]
    subprocess.run([*own, "install", *constraints, wheel], check=True, cwd=tmp_path)

    corpus = make_corpus(tmp_path / "corpus")
    away = tmp_path / "away"
    away.mkdir()
    prepare = f"prepare corpus=files sources=[{corpus}/*.txt] output=data/mine seq_len=64"
    train = "train name=a model=tiny data.path=data/mine budget.steps=5 eval.sequences=8"
    for line in (
        f"{prepare} tokenizer.vocab_size=300 valid_fraction=0.2",
        f"{train} batch.tokens=256 batch.micro_batch_size=4",
        *("eval run=a sequences=8", "generate run=a max_tokens=4", "inspect run=a sequences=2"),
        *("plan model=mod_3b data.seq_len=2048 budget.flops=1e20", "doctor"),
    ):
        command = [environment / "bin/modtrain", *line.split()]
        done = subprocess.run(command, cwd=away, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (away / "runs/a/COMPLETED").is_file()
