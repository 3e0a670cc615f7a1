"""How long a user waits: for the help, and for the first training step.

``python -m benchmarks.startup`` prints a table and, as its last line, one JSON object.
``over_import``: the time to the first step over that of a process that imports torch and Lightning
and ends; measured in turns in one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._harness import finish, interleave, print_times, ratio
from modtrain.data.config import PrepareConfig, TokenizerConfig
from modtrain.data.prepare.pipeline import prepare

WORDS = ("river", "stone", "sings", "under", "the", "old", "bridge")


def main() -> None:
    """Measure, print the table and the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _prepare(root)
        numbers = iter(range(10**6))
        seconds = interleave(
            {
                "help": lambda: _run("-m", "modtrain", "--help"),
                "imports": lambda: _run("-c", "import torch, lightning"),
                "first step": lambda: _first_step(root, next(numbers)),
            },
            rounds,
            warmup=1,
        )
    print_times("from the command on", seconds)
    finish(
        "startup",
        {
            "help_seconds": statistics.median(seconds["help"]),
            "first_step_seconds": statistics.median(seconds["first step"]),
            "over_import": ratio(seconds["first step"], seconds["imports"]),
        },
    )


def _prepare(root: Path) -> None:
    (root / "corpus").mkdir()
    for number in range(40):
        text = f"{number} " + " ".join(WORDS[i * i % len(WORDS)] for i in range(400))
        (root / "corpus" / f"{number}.txt").write_text(text)
    prepare(
        PrepareConfig(
            sources=[f"{root}/corpus/*.txt"],
            output=f"{root}/data",
            tokenizer=TokenizerConfig(vocab_size=300),
            seq_len=64,
            valid_fraction=0.2,
            num_workers=1,
        ),
        progress=False,
    )


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def _first_step(root: Path, number: int) -> None:
    """Start a run, and end it when its first step is recorded."""
    metrics = root / f"runs/{number}/metrics.jsonl"
    command = [
        *(sys.executable, "-m", "modtrain", "train", "model=tiny", f"name={number}"),
        *(f"runs_dir={root}/runs", f"data.path={root}/data", "budget.steps=1000000"),
        *("batch.tokens=64", "batch.micro_batch_size=1", "log.every=1", "log.tensorboard=false"),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.005)
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode} before its first step")
        process.kill()
    record = json.loads(metrics.read_text().splitlines()[0])
    if record["step"] != 1:
        raise RuntimeError("the first record is not of the first step")


if __name__ == "__main__":
    main()
