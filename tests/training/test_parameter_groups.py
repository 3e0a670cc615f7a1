"""Runs that train some parameters alone, or some later: which change, resumes, and strategies."""

from pathlib import Path

import pytest
import torch

from modtrain.checkpoint.layout import checkpoint_path
from modtrain.checkpoint.state import MODEL, OPTIMIZER
from modtrain.cli.compose import compose
from modtrain.common.errors import ConfigError
from modtrain.training.metrics_log import read_metrics
from modtrain.training.plan import resolve
from modtrain.training.run_directory import RunDirectory
from tests.helpers.ranks import on_ranks
from tests.helpers.runs import losses_of, run, run_lines, stopping
from tests.helpers.saved import assert_same_bits, newest_tensors, tensors_of
from tests.training.faults import run_cases

pytestmark = pytest.mark.usefixtures("no_stop_request")

ROUTERS = "optimizer.train=[routers]"
LATER = (
    "optimizer.groups=[{parameters: [routers], lr_scale: 2}, {parameters: ['*'], start_step: 2}]"
)
BRIEF = ("schedule.warmup_steps=1", "batch.micro_batch_size=1", "checkpoint.keep_last=9")


def lines(prepared, runs, name, *more):
    return run_lines(prepared, runs, name, *BRIEF, "checkpoint.every=1", *more)


def parameters_of(runs: Path, name: str, step: int) -> dict:
    tensors = tensors_of(checkpoint_path(runs / name / "checkpoints", step))
    return {key: value for key, value in tensors.items() if key.startswith(MODEL)}


def is_routing(key: str) -> bool:
    return any(part in key for part in (".router.", ".predictor.", ".gate.", ".threshold_"))


def changed(before: dict, after: dict) -> set[str]:
    return {key for key in before if not torch.equal(before[key], after[key])}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "deepspeed_2", "deepspeed_3"])
@pytest.mark.on_commit("single")
@pytest.mark.timeout(900)
def test_frozen_parameters_stay_and_have_no_state(prepared, tmp_path, strategy):
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")

    def start(own, stop=None):
        if strategy == "single":
            return [run_cases.run(own, None, stop)]
        return on_ranks(run_cases.run, 2, own, None, stop, joins=False)

    more = (f"strategy={strategy}", ROUTERS)
    assert set(start(lines(prepared, tmp_path, "whole", *more))) == {"complete"}
    if strategy != "single":
        own = lines(prepared, tmp_path, "cut", *more)
        assert set(start(own, (1, 1))) == {"stopped"}
        assert set(start(own)) == {"complete"}
        assert_same_bits(*(newest_tensors(tmp_path / name, 4) for name in ("whole", "cut")))
    first = parameters_of(tmp_path, "whole", 1)
    tensors = newest_tensors(tmp_path / "whole", 4)
    different = changed(first, tensors)
    assert different and all(is_routing(key) for key in different)
    states = {key for key in tensors if key.startswith(OPTIMIZER)}
    assert states and all(is_routing(key) for key in states)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.on_commit("adamw")
def test_parameters_that_start_later_resume_to_the_same_bits(prepared, tmp_path, optimizer):
    more = (f"optimizer={optimizer}", LATER)
    assert run(lines(prepared, tmp_path, "whole", *more)) == "complete"
    first, second = (parameters_of(tmp_path, "whole", step) for step in (1, 2))
    different = changed(first, second)
    assert different and all(is_routing(key) for key in different)
    tensors = newest_tensors(tmp_path / "whole", 4)
    assert len(changed(second, tensors)) > 2 * len(different)
    steps = {float(v) for k, v in tensors.items() if k.startswith(OPTIMIZER) and k.endswith("step")}
    assert steps == {2.0, 4.0}
    for name, step in (("before", 0), ("after", 2)):
        own = lines(prepared, tmp_path, name, *more)
        with stopping(step):
            assert run(own) == "stopped"
        assert run(own) == "complete"
        assert_same_bits(tensors, newest_tensors(tmp_path / name, 4))
        assert losses_of(tmp_path / name) == losses_of(tmp_path / "whole")
    records = [r for r in read_metrics(RunDirectory(tmp_path / "whole").metrics) if "loss" in r]
    rates = [(r.get("lr_group_1"), r.get("lr_group_2")) for r in records]
    assert [later == 0 for _, later in rates] == [True, True, False, False]


@pytest.mark.nightly
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp_tp"])
def test_ranks_start_parameters_later_as_one_process_does(prepared, tmp_path, strategy):
    assert run(lines(prepared, tmp_path, "one", LATER)) == "complete"
    own = lines(prepared, tmp_path, "two", LATER, f"strategy={strategy}")
    assert on_ranks(run, 2, own, joins=False) == ["complete"] * 2
    first, second = (parameters_of(tmp_path, "two", step) for step in (1, 2))
    assert all(is_routing(key) for key in changed(first, second))
    for key, value in parameters_of(tmp_path, "one", 4).items():
        torch.testing.assert_close(
            parameters_of(tmp_path, "two", 4)[key], value, rtol=1e-3, atol=1e-4
        )


@pytest.mark.slow
def test_what_a_run_cannot_train_is_refused_at_its_start(prepared, tmp_path):
    for more, key in (
        ("optimizer.train=[layers.99.*]", "optimizer.train"),
        ("optimizer.groups=[{parameters: ['*'], start_step: 9}]", "optimizer.groups"),
        ("optimizer.groups=[{parameters: ['head.*'], start_step: 9}]", "optimizer.groups"),
    ):
        with pytest.raises(ConfigError) as raised:
            resolve(compose("train", lines(prepared, tmp_path, "wrong", more)))
        assert [problem.key for problem in raised.value.problems] == [key]


@pytest.mark.slow
def test_frozen_parameters_count_as_trained_in_a_budget(prepared, tmp_path):
    """An upper bound, which the plan names."""
    of_all, of_routers = (
        resolve(compose("train", lines(prepared, tmp_path, "any", *more)))[1]
        for more in ((), (ROUTERS,))
    )
    assert of_all.flops == of_routers.flops
