"""Runs by name: by their path, misspelt, and directories of several."""

import pytest

from modtrain.cli import main as cli
from modtrain.cli.base_config import expand_base
from modtrain.cli.compose import compose
from modtrain.common.errors import CheckpointError, ModtrainError
from modtrain.training.named_runs import name_of, open_run
from modtrain.training.run_listing import run_names
from tests.helpers.problems import problems_of


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("first", "quickstart/dense", "quickstart/mod", "a=1"):
        (tmp_path / "runs" / name / "checkpoints/step-000000001").mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("seed: 1\n")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    "given",
    [
        *("first", "first/", "runs/first", "runs/first/", "./runs/first", "runs/first/config.yaml"),
        *("runs/../runs/first", "runs/first/checkpoints/../"),
    ],
)
def test_a_run_may_be_given_by_its_path(runs, given):
    for verb in ("eval", "status") if given == "runs/first/" else ("cancel",):
        assert compose(verb, [f"run={given}"]).run == "first"
    if not given.startswith("first"):
        assert compose("eval", [f"run={runs.parent}/{given}"]).run == "first"
    assert compose("train", [f"branch.run={given}"]).branch.run == "first"


def test_a_name_is_left_as_it_is(runs):
    for name in ("quickstart/mod", "nope", "runs", ".", "", "../elsewhere"):
        assert name_of("runs", name) == name
    (runs / "runs/first").mkdir(parents=True)
    assert name_of("runs", "runs/first") == "runs/first"


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("frist", ["did you mean run=first?"]),
        ("mod", ["did you mean run=quickstart/mod?"]),
        ("a=2", ["""did you mean 'run="a=1"'?"""]),
        ("quickstart", ["has runs: quickstart/dense, quickstart/mod", "run=quickstart/dense"]),
        ("zzz", ["there are: a=1, first, quickstart/dense, quickstart/mod"]),
    ],
)
def test_a_run_that_is_not_there_is_answered_with_those_that_are(runs, given, texts):
    with pytest.raises(CheckpointError) as error:
        open_run("runs", given)
    assert all(text in str(error.value) for text in texts)
    assert texts[0].replace("run=", "from=") in str(
        problems_of(expand_base, "train", [f'from="{given}"'], None)["from"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["eval", "generate", "inspect", "checkpoints", "data", "logs"])
def test_every_verb_names_the_run_that_is_meant(runs, verb, capsys):
    words = {"generate": ["prompt=a"], "inspect": ["text=a"], "data": ["step=1"]}
    assert cli.main([verb, "run=frist", *words.get(verb, [])]) == 1
    assert "did you mean run=first?" in capsys.readouterr().err


def test_where_there_is_no_run_the_remedy_is_runs_dir(tmp_path):
    with pytest.raises(ModtrainError, match="runs_dir="):
        open_run(str(tmp_path / "none"), "first")
    assert run_names(tmp_path / "none") == []


def test_a_new_name_is_not_given_with_runs_dir(runs):
    problem = problems_of(lambda: compose("train", ["name=runs/x", "budget.steps=1", "zzz=1"]))
    assert problem["name"].remedy == "write name=x"
    (runs / "runs/x").mkdir(parents=True)
    assert "name" not in problems_of(compose, "train", ["name=runs/x", "budget.steps=1", "zzz=1"])
