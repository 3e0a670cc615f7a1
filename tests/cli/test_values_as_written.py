"""Values that a shell, Hydra or YAML changes on their way: homes, texts like numbers, names."""

from pathlib import Path

import pytest

from modtrain.cli import main as cli
from modtrain.cli.base_config import expand_base
from modtrain.cli.compose import compose
from modtrain.cli.home_paths import expand_config, expand_words
from modtrain.cluster.site import ClusterConfig
from modtrain.common.errors import ConfigError
from modtrain.common.overrides import parse
from tests.helpers.problems import problems_of


@pytest.fixture
def home(tmp_path, monkeypatch):
    home = tmp_path / "my home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return home


def composed(verb, *words, **options):
    return compose(verb, expand_words(words), **options)


@pytest.mark.on_commit(1)
@pytest.mark.parametrize("form", ["{}", '"{}"', "'{}'"])
def test_a_tilde_is_the_home_directory_in_every_path(home, form):
    (home / "corpus.jsonl").write_text("{}")
    at = form.format("~/x y" if form != "{}" else "~/x")
    path = str(home / ("x y" if form != "{}" else "x"))
    assert composed("train", "name=a", f"runs_dir={at}", "budget.steps=1").runs_dir == path
    assert composed("prepare", "sources=[a.txt]", f"output={at}").output == path
    assert composed("eval", "run=a", f"data_path={at}").data_path == path
    assert composed("plan", "budget.steps=1", f"data.path={at}").data.path == path
    given = composed("prepare", "sources=[a.txt]", "output=o", f"tokenizer.path={at}")
    assert given.tokenizer.path == path
    assert composed("generate", "run=a", "prompt='~/x'").prompt == "~/x"


def test_a_tilde_in_a_list_and_in_a_file_is_the_home_directory(home, tmp_path):
    config = composed("prepare", "sources=[~/a/*.txt, 'b.txt', \"~/c\"]", "output=o")
    assert config.sources == [f"{home}/a/*.txt", "b.txt", f"{home}/c"]
    (tmp_path / "mine/experiment").mkdir(parents=True)
    file = tmp_path / "mine/experiment/here.yaml"
    file.write_text("# @package _global_\nruns_dir: ~/runs\nbudget:\n  steps: 1\n")
    words = ["name=a", "experiment=here"]
    assert composed("train", *words, config_dir=str(tmp_path / "mine")).runs_dir == f"{home}/runs"


@pytest.mark.parametrize(
    ("verb", "word", "key"),
    [
        ("import", "source=~/x", "source"),
        ("import", "tokenizer=~/x", "tokenizer"),
        ("eval", "tasks=[~/x]", "tasks"),
        ("eval", "task.path=~/x", "task.path"),
        ("fit", "points=~/x", "points"),
        ("submit", "cluster.image=~/x", "cluster.image"),
        ("submit", "cluster.mounts=[~/x:/data]", "cluster.mounts"),
        ("submit", "cluster.scratch='~/x'", "cluster.scratch"),
        ("submit", "cluster.on_given_up=[~/x,a]", "cluster.on_given_up"),
    ],
)
def test_a_tilde_is_the_home_directory_in_every_key_that_takes_a_file(home, verb, word, key):
    (given,) = parse(expand_words([word]))[0]
    assert given.key_or_group == key
    values = given.value() if isinstance(given.value(), list) else [given.value()]
    assert str(values[0]).startswith(f"{home}/x")
    assert "~" not in "".join(map(str, values))


def test_a_tilde_in_a_list_of_a_file_is_the_home_directory(home):
    site = ClusterConfig(mounts=["~/data:/data", "a"], scratch="~/s", image="docker://~/x")
    expand_config(site)
    assert site.mounts == [f"{home}/data:/data", "a"]
    assert (site.scratch, site.image) == (f"{home}/s", "docker://~/x")


def test_a_tilde_in_the_sources_of_a_mixture_is_the_home_directory(home, tmp_path):
    sources = "data.sources={a: {path: ~/a, weight: 2}, b: {path: '~/b'}}"
    given = composed("plan", "budget.steps=1", "data=mixture", sources)
    assert given.data.paths == {"a": f"{home}/a", "b": f"{home}/b"}
    (tmp_path / "mine/data").mkdir(parents=True)
    file = tmp_path / "mine/data/two.yaml"
    file.write_text("path: ''\nsources:\n  a: {path: ~/a}\n  b: {path: ~/b}\n")
    options = {"config_dir": str(tmp_path / "mine")}
    assert composed("plan", "budget.steps=1", "data=two", **options).data.paths == given.data.paths


def test_the_command_line_expands_before_all_else(home, capsys):
    assert cli.main(["config", "train", "name=a", "budget.steps=1", "runs_dir=~/runs"]) == 0
    # YAML may break a line at a blank.
    assert f"runs_dir: {home}/runs" in " ".join(capsys.readouterr().out.split())
    (home / "base.yaml").write_text("seed: 7\n")
    assert cli.main(["config", "train", "from=~/base.yaml", "name=a", "budget.steps=1"]) == 0
    assert "seed: 7" in capsys.readouterr().out
    assert not Path("~").exists()


def test_texts_of_a_list_are_as_written_or_refused_with_their_quotes():
    words = ["run=a", "prompt=x"]
    problem = problems_of(compose, "generate", [*words, "stop=[true,1e3,5]"])["stop"]
    assert "True, 1000.0" in problem.reason
    assert problem.remedy == """write 'stop=["true", "1e3", "5"]'"""
    assert compose("generate", [*words, 'stop=["true", "1e3", "5"]']).stop == ["true", "1e3", "5"]
    assert compose("generate", [*words, "stop=[5, a]"]).stop == ["5", "a"]


@pytest.mark.on_commit(1)
@pytest.mark.parametrize(
    ("text", "value"), [("2026_11_28", "20261128"), ("12e3456", "inf"), ("1_0", "10")]
)
def test_a_name_in_a_file_is_not_read_as_a_number(tmp_path, text, value):
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment/mine.yaml"
    start = "# @package _global_\nbudget:\n  steps: 1\nname: "
    file.write_text(f"{start}{text}\n")
    with pytest.raises(ConfigError) as caught:
        compose("train", ["experiment=mine"], str(tmp_path))
    assert f"name={text}: would be read as {value}, in {file}, line 4" in str(caught.value)
    assert f'name: "{text}"' in str(caught.value)
    file.write_text(f'{start}"{text}"\n')
    assert compose("train", ["experiment=mine"], str(tmp_path)).name == text
    file.write_text(f"{start}7\n")
    assert compose("train", ["experiment=mine"], str(tmp_path)).name == "7"


def test_a_text_in_the_base_of_a_run_is_not_read_as_a_number(tmp_path):
    file = tmp_path / "base.yaml"
    file.write_text("log:\n  wandb_project: 2026_11\n")
    problem = problems_of(expand_base, "train", [f"from={file}"], None)["log.wandb_project"]
    assert f"would be read as 202611, in {file}, line 2" in problem.reason
    file.write_text("name: 2026_11\nseed: 7\n")
    assert "name" in problems_of(expand_base, "train", [f"from={file}"], None)
    # That of another run is not taken.
    (tmp_path / "manifest.json").write_text("{}")
    run = file.rename(tmp_path / "config.yaml")
    assert expand_base("train", [f"from={run}"], None) == ["seed=7"]


@pytest.mark.parametrize("character", ["\x1b", "\t", "\n", "\x9b"])
def test_a_name_is_no_command_to_the_terminal(character):
    for verb, key in (("train", "name"), ("search", "study"), ("import", "name")):
        problem = problems_of(compose, verb, [f'{key}="a{character}[31mb"', "nosuch=1"])[key]
        assert problem.reason == "has control characters"
        assert character not in str(problem.value)
    assert compose("train", ['name="[v1] é :fire:"']).name == "[v1] é :fire:"
