"""Whole runs on several ranks: the same losses, routing and weights as one process."""

from functools import partialmethod
from pathlib import Path

import pytest
from torch import nn

from modtrain.cli.compose import compose
from modtrain.training.metrics_log import read_metrics
from modtrain.training.run import train
from tests.helpers.ranks import on_ranks

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


# Rounding of gradients grows in the iteration: see docs/concepts/optimizers.md.
MUON = ["optimizer=muon", "optimizer.muon.lr=2e-4", "model.pattern=dense"]


@pytest.mark.slow
@pytest.mark.on_commit("fsdp")
@pytest.mark.parametrize("strategy", QUICK)
def test_two_ranks_train_by_muon_as_one_process(prepared, tmp_path, strategy):
    lines = overrides(prepared, tmp_path, "one", *MUON)
    assert on_ranks(run, 1, lines, joins=False) == ["complete"]
    lines = overrides(prepared, tmp_path, "two", f"strategy={strategy}", *MUON)
    assert on_ranks(run, 2, lines, joins=False) == ["complete"] * 2
    for one, two in zip(records_of(tmp_path, "one"), records_of(tmp_path, "two"), strict=True):
        close(one, two)


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize("strategy", QUICK)
def test_a_rank_without_a_held_out_sequence_changes_no_mean(prepared, tmp_path, strategy):
    own = ["batch.tokens=384", "eval.sequences=2", "budget.steps=3"]
    lines = overrides(prepared, tmp_path, "one", *own)
    assert on_ranks(run, 1, lines, joins=False) == ["complete"]
    lines = overrides(prepared, tmp_path, "three", f"strategy={strategy}", *own)
    assert on_ranks(run, 3, lines, joins=False) == ["complete"] * 3
    one, three = records_of(tmp_path, "one"), records_of(tmp_path, "three")
    assert any("held_out/causal_loss" in record for record in one)
    for alone, spread in zip(one, three, strict=True):
        close(alone, spread)


def count_graphs(lines: list[str]) -> int:
    """Train with layers compiled for no backend; return how many graphs there were."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    nn.Module.compile = partialmethod(nn.Module.compile, backend=backend)
    assert run(lines) == "complete"
    return len(graphs)


# As many stages as the compiler has graphs for: one more would end the run.
LEVELS = 8
STEPS = 16


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize("strategy", QUICK)
def test_evaluations_are_not_compiled(prepared, tmp_path, strategy):
    lines = overrides(
        *(prepared, tmp_path, "eager", f"strategy={strategy}", f"budget.steps={STEPS}"),
        *("capacity_schedule=linear", f"capacity_schedule.levels={LEVELS}"),
        # A last batch of another size, and more than one way to choose.
        *("eval.sequences=6", "eval.every=4", "model.router.causal=[predictor,threshold]"),
    )
    assert on_ranks(run, 2, lines, joins=False) == ["complete"] * 2
    counts = on_ranks(count_graphs, 2, [*lines, "name=compiled", "compile=true"], joins=False)
    # Two dense layers and two routed ones: none of training's graphs is made anew either.
    assert counts == [2 + 2 * LEVELS] * 2
    eager, compiled = records_of(tmp_path, "eager"), records_of(tmp_path, "compiled")
    for one, other in zip(eager, compiled, strict=True):
        close(one, other)
