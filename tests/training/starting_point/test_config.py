"""Mistakes that are named before anything is read, and what is printed of a start."""

import functools

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from modtrain.cli.base_config import expand_base
from modtrain.cli.compose import compose
from modtrain.cluster.config import StatusConfig
from modtrain.cluster.status import show_status
from modtrain.experiments.compare.config import add_controls
from modtrain.training.run_directory import RunDirectory
from tests.helpers.problems import problems_of

CONVERTED = (
    *("init.run=a", "init.map=pattern", "init.keep_function=true", "model.pattern=every_other"),
    *("model.router.gate=tanh", "model.router.gate_offset=1", "capacity_schedule.name=linear"),
)


@functools.cache
def base_config():
    return compose("train", ["model=tiny", "name=b", "budget.steps=4"])


def init_keys(*values):
    changed = OmegaConf.from_dotlist([*values])
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(base_config()), changed))
    return {problem.key: problem for problem in config.problems() if "init" in problem.key}


@pytest.mark.parametrize(
    ("given", "key", "reason"),
    [
        (["init.run=b"], "init.run", "this run itself"),
        (["init.run=../a"], "init.run", "not a directory"),
        (["init.step=2"], "init.run", "is missing"),
        (["init.run=a", "init.step=-1"], "init.step", "is not 0 or more"),
        (["init.run=a", "init.map=all"], "init.map", "is not known"),
        (["init.run=a", "init.layers=[0,1]"], "init.layers", "model.num_layers=4"),
        (["init.run=a", "init.layers=[0,1,-2,3]"], "init.layers", "is not a layer"),
        (["init.run=a", "branch.run=c", "branch.step=1"], "init.run", "branch.run=c"),
        ([*CONVERTED, "init.map=same"], "init.keep_function", "a dense model that becomes"),
        ([*CONVERTED, "init.layers=[0,1,2,3]"], "init.layers", "needs every layer"),
        ([*CONVERTED, "model.router.score=random"], "init.keep_function", "needs learned scores"),
        (
            [*CONVERTED, "model.router.gate=none", "model.router.gate_offset=0"],
            "init.keep_function",
            "needs a gate",
        ),
        ([*CONVERTED, "model.router.gate_offset=0.5"], "init.keep_function", "this one is 0.5"),
        ([*CONVERTED, "model.router.gate=sigmoid"], "init.keep_function", "this one is 1.5"),
        ([*CONVERTED, "capacity_schedule.start=0.5"], "init.keep_function", "start at 1"),
        ([*CONVERTED, "capacity_schedule.name=constant"], "init.keep_function", "start at 1"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(given, key, reason):
    named = init_keys(*given)
    assert set(named) == {key}
    assert reason in named[key].reason
    assert named[key].remedy


def test_what_keeps_the_function_is_no_mistake():
    assert not init_keys("init.run=b", "init.runs_dir=elsewhere")
    for gate in ("tanh", "raw"):
        assert not init_keys(*CONVERTED, f"model.router.gate={gate}")
    sigmoid = ("model.router.gate=sigmoid", "model.router.gate_multiplier=2")
    assert not init_keys(*CONVERTED, *sigmoid, "model.router.gate_offset=0")


@pytest.mark.parametrize("verb", ["isoflop", "search-patterns"])
def test_models_of_several_shapes_take_no_weights(verb):
    own = compose(verb, ["init.run=a"]).problems_by_part()
    assert [problem.key for problem in own["init"]] == ["init.run"]


def test_a_control_of_fewer_layers_takes_no_weights():
    arm = compose("compare", ["model=tiny", "init.run=a", "init.map=pattern"])
    assert set(problems_of(add_controls, {"mod": arm})) == {"controls"}


def test_a_base_leaves_its_own_starting_point_where_there_is_another(tmp_path):
    (tmp_path / "b.yaml").write_text("init: {run: a, step: 400}\nbudget: {steps: 3}\n")
    base = f"from={tmp_path}/b.yaml"
    again = compose("train", expand_base("train", [base], None))
    assert (again.init.run, again.init.step) == ("a", 400)
    following = compose("train", expand_base("train", [base, "init.run=b"], None))
    assert (following.init.run, following.init.step, following.budget.steps) == ("b", None, 3)
    branch = ["branch.run=b", "branch.step=3"]
    longer = compose("train", expand_base("train", [base, *branch], None))
    assert (longer.init.run, longer.branch.run) == (None, "b")


def test_status_shows_what_a_run_began_with(tmp_path, capsys):
    config = compose("train", ["model=tiny", "name=b", "budget.steps=4", f"runs_dir={tmp_path}"])
    parent = {"how": "init", "run": "runs/a", "step": 400, "digest": "0" * 64}
    RunDirectory.of(config).start(config, "0" * 64, "cpu", parent)
    show_status(StatusConfig(run="b", runs_dir=str(tmp_path)), Console(width=200))
    assert "runs/a, step 400 (init.run)" in capsys.readouterr().out
