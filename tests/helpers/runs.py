"""Small whole runs, by the command line's overrides, what befalls them, and their records."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from modtrain.cli.compose import compose
from modtrain.training.metrics_log import read_metrics
from modtrain.training.module import LanguageModule
from modtrain.training.run import train
from modtrain.training.stop_signal import STOP
from tests.helpers.ranks import on_ranks


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


def before_step(
    step: int, act: Callable[[], object], patch: Callable = setattr, rank: int | None = None
) -> None:
    """Have ``act`` called before each micro-batch of a step, counted from 0, on a rank or on all.

    patch: a monkeypatch's ``setattr``, unless the process ends with the run.
    """
    original = LanguageModule.training_step

    def training_step(module, batch, batch_idx):
        if module.global_step == step and rank in (None, module.global_rank):
            act()
        return original(module, batch, batch_idx)

    patch(LanguageModule, "training_step", training_step)


def request_stop() -> None:
    """As a signal does."""
    STOP.signum = 15


@contextmanager
def stopping(step: int) -> Iterator[None]:
    """Let a run in this process get a signal before a step, and the next one none."""
    with pytest.MonkeyPatch.context() as patch:
        before_step(step, request_stop, patch.setattr)
        yield
    STOP.signum = None


def losses_of(run: Path) -> dict[int, float]:
    """The losses of a run's records of training, by step."""
    return {r["step"]: r["loss"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r}


def last_step(run: Path) -> int:
    """The last step that is recorded of a run; 0: none."""
    return max((record["step"] for record in read_metrics(run / "metrics.jsonl")), default=0)


def assert_same_records(runs: Path, one: str, other: str, atol: float = 5e-5) -> None:
    """Equal records but for speed. Rounding may choose another token, which routers' may show."""
    histories = [read_metrics(runs / name / "metrics.jsonl") for name in (one, other)]
    assert any("held_out/causal_loss" in record for record in histories[0])
    for expected, actual in zip(*histories, strict=True):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            if not key.startswith("throughput"):
                near = 5e-3 if key.startswith(("router", "experts")) else atol
                assert actual[key] == pytest.approx(value, abs=near, rel=1e-5), key


def assert_trains_alike(
    prepared: Path, runs: Path, world_size: int, own: list[str], strategy: list[str], atol: float
) -> None:
    """A run ``many`` of so many ranks has the records of ``one``, a run of one process."""
    for name, ranks, lines in (("one", 1, own), ("many", world_size, [*own, *strategy])):
        overrides = run_lines(prepared, runs, name, *lines)
        assert on_ranks(run, ranks, overrides, joins=False) == ["complete"] * ranks
    assert_same_records(runs, "one", "many", atol)
