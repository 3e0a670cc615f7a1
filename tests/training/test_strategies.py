"""Whole runs on several ranks: the same losses, routing and weights as one process."""

from pathlib import Path

import pytest
from ranks import on_ranks

from modtrain.configuration import compose
from modtrain.training.metrics_log import read_metrics
from modtrain.training.run import train

SEQUENCES = 8
QUICK = ("ddp", "fsdp")


def overrides(prepared: Path, runs: Path, name: str, *more: str) -> list[str]:
    return [
        *("model=tiny", f"data.path={prepared}", f"runs_dir={runs}", f"name={name}"),
        *("budget.steps=6", f"batch.tokens={SEQUENCES * 64}", "batch.micro_batch_size=2"),
        *("checkpoint.every=3", "eval.every=3", "eval.sequences=8", "eval.batch_size=2"),
        *("log.every=1", "log.tensorboard=false", "log.progress=false"),
        *("strategy.accelerator=cpu", "strategy.timeout=60", *more),
    ]


def run(lines: list[str]) -> str:
    return train(compose("train", lines)).status


def records_of(runs: Path, name: str) -> list[dict[str, float]]:
    return read_metrics(runs / name / "metrics.jsonl")


def close(one: dict[str, float], other: dict[str, float]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        # Those of the last micro-batch alone, of which each rank has another.
        if key.startswith(("throughput", "router", "experts")):
            continue
        assert other[key] == pytest.approx(value, abs=2e-5, rel=1e-5), key


FAMILY = {
    "mod": [],
    "dense": ["model.pattern=dense"],
}


@pytest.mark.parametrize("strategy", QUICK)
@pytest.mark.parametrize("model", FAMILY)
def test_two_ranks_are_as_one_process(prepared, tmp_path, strategy, model):
    lines = overrides(prepared, tmp_path, "one", *FAMILY[model])
    assert on_ranks(run, 1, lines, joins=False) == ["complete"]
    lines = overrides(prepared, tmp_path, "two", f"strategy={strategy}", *FAMILY[model])
    assert on_ranks(run, 2, lines, joins=False) == ["complete"] * 2
    for one, two in zip(records_of(tmp_path, "one"), records_of(tmp_path, "two"), strict=True):
        close(one, two)
