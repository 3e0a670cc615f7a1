"""Whole runs on several ranks: the same losses, routing and weights as one process."""

from functools import partialmethod

import pytest
from torch import nn

from modtrain.common.torch_compat import HAS_ISOLATED_RECOMPILES
from tests.helpers.ranks import on_ranks
from tests.helpers.runs import assert_same_records, assert_trains_alike, run, run_lines

QUICK = ("ddp", "fsdp")
SIX_STEPS = ("budget.steps=6", "checkpoint.every=3", "eval.every=3")


# Rounding of gradients grows in the iteration: see docs/concepts/optimizers.md.
MUON = ["optimizer=muon", "optimizer.muon.lr=2e-4", "model.pattern=dense"]


@pytest.mark.slow
@pytest.mark.on_commit("fsdp")
@pytest.mark.parametrize("strategy", QUICK)
def test_two_ranks_train_by_muon_as_one_process(prepared, tmp_path, strategy):
    own = [*SIX_STEPS, *MUON]
    assert_trains_alike(prepared, tmp_path, 2, own, [f"strategy={strategy}"], 2e-5)


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize("strategy", QUICK)
def test_a_rank_without_a_held_out_sequence_changes_no_mean(prepared, tmp_path, strategy):
    own = [*SIX_STEPS, "batch.tokens=384", "eval.sequences=2", "budget.steps=3"]
    assert_trains_alike(prepared, tmp_path, 3, own, [f"strategy={strategy}"], 2e-5)


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
    lines = run_lines(
        *(prepared, tmp_path, "eager", *SIX_STEPS, f"strategy={strategy}", f"budget.steps={STEPS}"),
        *("capacity_schedule=linear", f"capacity_schedule.levels={LEVELS}"),
        # A last batch of another size, and more than one way to choose.
        *("eval.sequences=6", "eval.every=4", "model.router.causal=[predictor,threshold]"),
    )
    assert on_ranks(run, 2, lines, joins=False) == ["complete"] * 2
    counts = on_ranks(count_graphs, 2, [*lines, "name=compiled", "compile=true"], joins=False)
    # Of each kind, dense and routed, are two layers, which share graphs before torch 2.13.
    # None of training's graphs is made anew either.
    assert counts == [(1 + HAS_ISOLATED_RECOMPILES) * (1 + LEVELS)] * 2
    assert_same_records(tmp_path, "eager", "compiled", 2e-5)
