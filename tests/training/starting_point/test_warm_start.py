"""Runs that start with the weights of another run, under settings of their own."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from modtrain.checkpoint.layout import MANIFEST, Manifest, checkpoint_path
from modtrain.checkpoint.recovery import latest
from modtrain.checkpoint.state import OPTIMIZER
from modtrain.cli.compose import compose
from modtrain.common.atomic_io import file_sha256
from modtrain.common.errors import StartingPointError
from modtrain.training.plan import resolve
from modtrain.training.run_directory import RunDirectory
from modtrain.training.starting_point.find import find_starting_point
from tests.helpers.ranks import RankFailedError, on_ranks, outcomes_on_ranks
from tests.helpers.runs import losses_of, run, run_lines, stopping
from tests.helpers.saved import assert_same_bits, newest_tensors, newest_weights

pytestmark = [pytest.mark.usefixtures("no_stop_request"), pytest.mark.slow]

DENSE = "model.pattern=dense"
# Such a step changes no weight by as much as 1e-9.
ONE_STEP = ("optimizer.lr=1e-12", "schedule=constant", "budget.steps=1")
CONVERTED = (
    *("init.map=pattern", "init.keep_function=true", "model.pattern=every_other"),
    *("model.router.gate=tanh", "model.router.gate_offset=1", "capacity_schedule=linear"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def lines(prepared, runs):
    def of(name, *more):
        return [*run_lines(prepared, runs, name), "checkpoint.every=100", *more]

    return of


@pytest.fixture(scope="module")
def dense(lines):
    """A dense run of two steps."""
    assert run(lines("dense", DENSE, "budget.steps=2")) == "complete"
    return "init.run=dense"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_2"])
@pytest.mark.on_commit("fsdp")
def test_ranks_take_the_weights_of_one_process(lines, runs, dense, strategy):
    if strategy == "deepspeed_2":
        pytest.importorskip("deepspeed")
    more = (dense, "init.map=pattern", "batch.micro_batch_size=1", *ONE_STEP)
    own = lines(f"on_{strategy}", f"strategy={strategy}", *more)
    assert on_ranks(run, 2, own, joins=False) == ["complete"] * 2
    before, after = newest_weights(runs / "dense", 2), newest_weights(runs / f"on_{strategy}", 1)
    assert before.keys() < after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-9)


@pytest.mark.nightly
def test_weights_that_do_not_fit_end_all_ranks(lines, dense):
    own = lines("misfit", "strategy=fsdp", dense, DENSE, "model.d_ff=32")
    outcomes = outcomes_on_ranks(run, 2, own, joins=False)
    assert all(isinstance(outcome, RankFailedError) for outcome in outcomes)
    assert any("layers.0-3.mlp.up.weight" in outcome.message for outcome in outcomes)


@pytest.mark.nightly
@pytest.mark.parametrize("strategy", ["single", "fsdp", "deepspeed_2"])
def test_the_optimizers_state_is_taken_by_choice(lines, runs, dense, strategy):
    if strategy == "deepspeed_2":
        pytest.importorskip("deepspeed")
    world_size = 1 if strategy == "single" else 2
    states = {}
    for taken in ("true", "false"):
        name = f"state_{strategy}_{taken}"
        more = (dense, DENSE, f"init.optimizer={taken}", "batch.micro_batch_size=1", *ONE_STEP)
        own = lines(name, f"strategy={strategy}", *more)
        assert on_ranks(run, world_size, own, joins=False) == ["complete"] * world_size
        states[taken] = newest_tensors(runs / name, 1)
    before = newest_tensors(runs / "dense", 2)
    for key in (key for key in before if key.startswith(OPTIMIZER)):
        with_state, without = states["true"][key], states["false"][key]
        if key.endswith(".step"):
            assert (float(with_state), float(without)) == (3, 1)
        if key.endswith(".exp_avg"):
            # Of the same gradient: both have the same weights and samples.
            torch.testing.assert_close(with_state - without, 0.9 * before[key], rtol=0, atol=1e-7)


def test_a_resume_needs_the_parent_no_more(lines, runs, dense):
    shutil.copytree(runs / "dense", runs / "parent")
    own = lines("child", "init.run=parent", DENSE, "init.optimizer=true", "data.seed=5")
    with stopping(1):
        assert run(own) == "stopped"
    manifest = json.loads((runs / "child" / "manifest.json").read_text())
    path = checkpoint_path(runs / "dense" / "checkpoints", 2)
    assert manifest["parent"] == {
        "how": "init",
        "run": str(runs / "parent"),
        "step": 2,
        "digest": file_sha256(path / MANIFEST),
    }
    shutil.rmtree(runs / "parent")
    # The newest checkpoint keeps it as well.
    (runs / "child" / "manifest.json").unlink()
    assert run(own) == "complete"
    restored = json.loads((runs / "child" / "manifest.json").read_text())
    assert restored["parent"] == manifest["parent"]
    assert run(lines("unbroken", dense, DENSE, "init.optimizer=true", "data.seed=5")) == "complete"
    assert_same_bits(newest_tensors(runs / "child", 4), newest_tensors(runs / "unbroken", 4))


def test_a_first_start_that_saved_nothing_decides_on_the_checkpoint(lines, runs, dense):
    """The other run may train on meanwhile."""
    shutil.copytree(runs / "dense", runs / "growing")
    own = lines("waiting", "init.run=growing", DENSE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modtrain.training.run._Run._fit", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(own)
    checkpoints = runs / "growing" / "checkpoints"
    own_config, plan = resolve(compose("train", own))
    fingerprint = RunDirectory(runs / "waiting").read_manifest()["data_fingerprint"]
    path = checkpoint_path(checkpoints, 2)
    write_copy_of_step(path, checkpoint_path(checkpoints, 3), 3)
    assert latest(checkpoints) == (3, checkpoint_path(checkpoints, 3))
    assert find_starting_point(own_config, plan, fingerprint).path == path
    shutil.rmtree(path)
    write_copy_of_step(checkpoint_path(checkpoints, 3), path, 2, world_size=2)
    with pytest.raises(StartingPointError, match="is another checkpoint than the one that"):
        run(own)


def write_copy_of_step(path, copy, step, **changes):
    shutil.copytree(path, copy)
    replace(Manifest.read(copy), step=step, **changes).write(copy)


def _interrupted(*_arguments):
    raise KeyboardInterrupt


def test_a_converted_model_computes_at_first_what_the_dense_one_does(lines, runs, dense):
    assert run(lines("dense_still", dense, DENSE, *ONE_STEP)) == "complete"
    assert run(lines("converted", dense, *CONVERTED, "optimizer.lr=1e-9")) == "complete"
    # The gate is 1 and all tokens are taken: the same loss on the same samples.
    first, still = losses_of(runs / "converted")[1], losses_of(runs / "dense_still")[1]
    assert first == pytest.approx(still, abs=2e-6)
    assert run(lines("drawn", dense, "init.map=pattern", *ONE_STEP)) == "complete"
    assert abs(losses_of(runs / "drawn")[1] - still) > 1e-4
    # And back: what only routers had is left.
    back = lines("back", "init.run=converted", "init.map=pattern", DENSE, *ONE_STEP)
    assert run(back) == "complete"
    assert losses_of(runs / "back")[1] == pytest.approx(still, abs=2e-6)
    weights = newest_weights(runs / "back", 1)
    assert weights.keys() == newest_weights(runs / "dense", 2).keys()


def test_a_finished_run_is_continued_with_the_bits_of_a_longer_one(lines, runs, dense):
    """Also one with the weights of another run, which the longer one needs no more."""
    wsd = ("schedule=wsd", "schedule.warmup_steps=2", "schedule.decay=0.4", DENSE)
    short = ("budget.steps=5", "checkpoint.keep_steps=[3]")
    # The decay of 5 steps begins after 3, that of 8 after 5.
    assert run(lines("short", *wsd, dense, *short)) == "complete"
    longer = lines("longer", *wsd, "budget.steps=8", "branch.run=short", "branch.step=3")
    assert run(longer) == "complete"
    assert run(lines("planned", *wsd, dense, "budget.steps=8")) == "complete"
    planned, short = losses_of(runs / "planned"), losses_of(runs / "short")
    assert {step: short[step] for step in (1, 2, 3)} == {step: planned[step] for step in (1, 2, 3)}
    assert losses_of(runs / "longer") == {step: planned[step] for step in range(4, 9)}
    assert_same_bits(newest_tensors(runs / "longer", 8), newest_tensors(runs / "planned", 8))
    assert RunDirectory(runs / "longer").read_manifest()["parent"]["how"] == "branch"


def test_what_does_not_fit_is_listed_whole(lines, runs, dense):
    def message(*more):
        with pytest.raises(StartingPointError) as error:
            run(lines("refused", dense, *more))
        assert not (runs / "refused" / "config.yaml").exists()
        # A job would try it again otherwise.
        assert error.value.exit_code == 2
        return str(error.value)

    text = message(DENSE, "model.d_ff=32", "model.vocab_size=301", "model.num_heads=1")
    for part in (
        "refused cannot start with the weights of",
        "model.num_heads: 2 in dense, 1 now",
        "embedding.weight: (300, 32) in dense, (301, 32) now",
        "layers.0-3.mlp.up.weight: (",
        "remedy: set model.vocab_size=300",
    ):
        assert part in text
    assert "init.map=pattern" in message("model.pattern=every_other")
    assert "init.layers=[0, 1, ...]" in message(DENSE, "model.num_layers=2")
    assert "has no layer 4" in message(DENSE, "init.layers=[0,1,2,4]")
    assert "no checkpoint of step=7; there are: 2" in message(DENSE, "init.step=7")
    assert "of optimizer=adamw" in message(DENSE, "init.optimizer=true", "optimizer=muon")
    assert "model.rope_theta: 10000.0 -> 500.0 (init.keep_function)" in message(
        *CONVERTED, "model.rope_theta=500"
    )
    # ZeRO counts steps once for all tensors.
    zero, plan = resolve(compose("train", lines("refused", dense, *CONVERTED)))
    strategy, init = replace(zero.strategy, name="deepspeed_2"), replace(zero.init, optimizer=True)
    with pytest.raises(StartingPointError, match="counts steps once for all tensors"):
        find_starting_point(replace(zero, strategy=strategy, init=init), plan, "")
    with pytest.raises(StartingPointError, match="there is no run"):
        run(lines("refused", "init.run=absent", DENSE))


def test_weights_of_another_tokenizer_are_refused(lines, prepared, runs, dense, tmp_path):
    other = runs / "foreign"
    shutil.copytree(runs / "dense", other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace(str(prepared), str(tmp_path)))
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"data_fingerprint": "0" * 64}))

    def message(*more):
        with pytest.raises(StartingPointError) as error:
            run(lines("refused", "init.run=foreign", DENSE, *more))
        return str(error.value)

    # The data are no longer there.
    assert "tokenizer: unknown" in message()
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    (other / "config.yaml").write_text(text.replace("num_layers: 4", "num_layers: 1000000000"))
    assert "describes no model: model.num_layers=1000000000" in message()
    (other / "config.yaml").write_text(text.replace(str(prepared), str(tmp_path)))
    text = message()
    assert f"tokenizer: {prepared} has another one than {file}" in text
    assert f"modtrain prepare tokenizer.path={file}" in text
    shutil.copy(prepared / "tokenizer.json", file)
    assert run(lines("same_tokenizer", "init.run=foreign", DENSE, *ONE_STEP)) == "complete"
    file.unlink()
    trusting = ("init.run=foreign", DENSE, "init.check_tokenizer=false", *ONE_STEP)
    assert run(lines("trusting", *trusting)) == "complete"
