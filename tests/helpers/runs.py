"""Small whole runs, by the command line's overrides, and their records."""

from pathlib import Path

import pytest

from modtrain.cli.compose import compose
from modtrain.training.metrics_log import read_metrics
from modtrain.training.run import train


def run_lines(prepared: Path, runs: Path, name: str, *more: str) -> list[str]:
    return [
        *("model=tiny", f"data.path={prepared}", f"runs_dir={runs}", f"name={name}"),
        *("budget.steps=4", "batch.tokens=512", "batch.micro_batch_size=2"),
        *("checkpoint.every=2", "eval.every=2", "eval.sequences=8", "eval.batch_size=2"),
        *("log.every=1", "log.tensorboard=false", "log.progress=false"),
        *("strategy.accelerator=cpu", "strategy.timeout=60", *more),
    ]


def run(lines: list[str]) -> str:
    return train(compose("train", lines)).status


def assert_same_records(runs: Path, one: str, other: str, atol: float = 5e-5) -> None:
    """Equal records but for speed and what is of the last micro-batch, of which ranks differ."""
    histories = [read_metrics(runs / name / "metrics.jsonl") for name in (one, other)]
    assert any("held_out/causal_loss" in record for record in histories[0])
    for wanted, found in zip(*histories, strict=True):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            if not key.startswith(("throughput", "router", "experts")):
                assert found[key] == pytest.approx(value, abs=atol, rel=1e-5), key
