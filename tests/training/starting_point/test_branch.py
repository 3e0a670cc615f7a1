"""Runs that branch off another run's checkpoint: the same bits as runs from the start."""

import pytest

from modtrain.common.errors import CheckpointError
from modtrain.training.config import BranchConfig, TrainConfig
from modtrain.training.run_directory import RunDirectory
from modtrain.training.schedules import decay_start
from tests.helpers.problems import problems_of
from tests.helpers.ranks import on_ranks
from tests.helpers.runs import run, run_lines
from tests.helpers.saved import assert_same_bits, newest_tensors

pytestmark = pytest.mark.usefixtures("no_stop_request")

WSD = ("schedule=wsd", "schedule.warmup_steps=2", "schedule.decay=0.4")
MODELS = {
    "mod": ["model.router.causal=[predictor,threshold]"],
    "random": ["model.router.score=random", "model.router.causal=null", "optimizer=muon"],
}
SHORT, LONG = 6, 10
# Where the long run begins to decay; the short one does at 4.
TRUNK_STEPS = 6


@pytest.fixture
def lines(prepared, tmp_path):
    def of(name, steps, *more):
        saving = ("checkpoint.every=100", "checkpoint.keep_last=1", f"budget.steps={steps}")
        return [*run_lines(prepared, tmp_path, name), *saving, *WSD, *more]

    return of


def trunk_lines(lines, *more):
    constant = ("schedule.name=constant", "checkpoint.keep_steps=[2,4]")
    return lines("trunk", TRUNK_STEPS, *constant, *more)


@pytest.mark.slow
@pytest.mark.on_commit("mod")
@pytest.mark.parametrize("model", MODELS)
def test_a_branch_has_the_bits_of_a_run_from_the_start(lines, tmp_path, model):
    more = MODELS[model]
    assert run(trunk_lines(lines, *more)) == "complete"
    saved = {path.name for path in (tmp_path / "trunk/checkpoints").iterdir()}
    assert saved == {"step-000000002", "step-000000004", "step-000000006"}
    for steps, start, trunk in ((SHORT, 4, "trunk"), (LONG, 6, "renamed")):
        if trunk != "trunk":
            (tmp_path / "trunk").rename(tmp_path / trunk)
        branch = (f"branch.run={trunk}", f"branch.step={start}")
        assert run(lines(f"branch{steps}", steps, *more, *branch)) == "complete"
        assert run(lines(f"whole{steps}", steps, *more)) == "complete"
        whole = newest_tensors(tmp_path / f"whole{steps}", steps)
        assert_same_bits(whole, newest_tensors(tmp_path / f"branch{steps}", steps))
    config = RunDirectory(tmp_path / f"branch{LONG}").read_config()
    assert decay_start(config.schedule, LONG) == TRUNK_STEPS


@pytest.mark.nightly
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_branch_of_two_ranks_has_the_bits_of_a_run_from_the_start(lines, tmp_path, strategy):
    on_two = f"strategy={strategy}", "batch.micro_batch_size=1"
    branch = ("branch.run=trunk", "branch.step=6")
    for run_of in (
        trunk_lines(lines, *on_two),
        lines("branch", LONG, *on_two, *branch),
        lines("whole", LONG, *on_two),
    ):
        assert on_ranks(run, 2, run_of, joins=False) == ["complete"] * 2
    whole = newest_tensors(tmp_path / "whole", LONG)
    assert_same_bits(whole, newest_tensors(tmp_path / "branch", LONG))


@pytest.mark.slow
def test_what_is_not_the_first_part_of_a_run_is_no_trunk(lines, tmp_path):
    run(trunk_lines(lines))

    def message(*more, steps=LONG, start=6):
        branch = ("branch.run=trunk", f"branch.step={start}")
        with pytest.raises(CheckpointError) as error:
            run(lines("branch", steps, *branch, *more))
        assert error.value.exit_code == 2
        return str(error.value)

    assert "optimizer.lr: 0.001 in the trunk, 0.002 now" in message("optimizer.lr=0.002")
    assert "seed: 0 in the trunk, 1 now" in message("seed=1", "data.seed=0")
    assert "batch.micro_batch_size" in message("batch.micro_batch_size=1")
    assert "schedule: the rate of step 6 is 1 of the highest" in message("schedule.decay=0.5")
    assert "schedule: the rate of step 1 is 0.5" in message("schedule.warmup_steps=3")
    assert "branch.step: 6 is not before the last of 6 steps" in message(steps=SHORT)
    assert "no checkpoint of step=3; there are: 2, 4, 6" in message(steps=SHORT, start=3)
    assert "there is no run" in message("branch.run=nothing")
    assert not (tmp_path / "branch/COMPLETED").exists()


@pytest.mark.parametrize(
    ("branch", "key"),
    [
        (BranchConfig(run="a"), "branch.step"),
        (BranchConfig(step=3), "branch.run"),
        (BranchConfig("a", 0), "branch.step"),
        (BranchConfig("b", 1), "branch.run"),
        (BranchConfig("../a", 1), "branch.run"),
    ],
)
def test_a_branch_names_another_run_and_a_step(branch, key):
    from modtrain.common.errors import raise_if_any

    config = TrainConfig(name="b", branch=branch)
    problems = problems_of(raise_if_any, [p for p in config.problems() if "branch" in p.key])
    assert set(problems) == {key}
