"""Renamed keys: an error where a user writes an old one, translated where a run has stored it."""

import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from modtrain.cli import main as cli
from modtrain.cli.compose import SCHEMAS, compose
from modtrain.cli.compose_verbs import compose_arms, compose_search, compose_submission
from modtrain.cluster.runs import read_run
from modtrain.common.errors import OtherRunError
from modtrain.common.renamed_keys import RENAMED_KEYS, flatten, new_name, translate
from modtrain.experiments.search.config import parse_space
from modtrain.experiments.search.search import suggest
from modtrain.experiments.search.study import open_study
from modtrain.training.plan import resolve
from modtrain.training.run_directory import RunDirectory, check_resumable
from tests.helpers.problems import problems_of

TABLE = {
    "model.share": "model.capacity",
    "batch.size": "batch.tokens",
    "held_out": "eval",
    "saving.keep": "checkpoint.keep_last",
}


@pytest.fixture
def renamed(monkeypatch):
    for old, new in TABLE.items():
        monkeypatch.setitem(RENAMED_KEYS, old, new)


@pytest.fixture
def arguments(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [o for o in tiny if not o.startswith("budget")] + ["budget.steps=4"]


def use_old_keys(path: Path, table=TABLE) -> None:
    """Write a run's configuration as if its keys had never been renamed."""
    content = yaml.safe_load(path.read_text())
    for old, new in table.items():
        section, _, key = new.rpartition(".")
        value = content[section].pop(key) if section else content.pop(key)
        section, _, key = old.rpartition(".")
        (content.setdefault(section, {}) if section else content)[key] = value
    path.write_text(yaml.safe_dump(content))


def test_the_table_names_keys_of_today():
    keys = {key: set(_keys(OmegaConf.structured(schema))) for key, schema in SCHEMAS.items()}
    known = set().union(*keys.values())
    assert not RENAMED_KEYS.keys() & known
    assert set(RENAMED_KEYS.values()) <= known


def _keys(node, prefix=""):
    for key in node:
        yield f"{prefix}{key}"
        if OmegaConf.is_dict(child := node._get_node(key)) and not child._is_none():
            yield from _keys(child, f"{prefix}{key}.")


def test_a_sections_name_covers_its_keys(renamed):
    assert new_name("held_out.every") == "eval.every"
    assert new_name("held_out") == "eval"
    assert new_name("held_outs.every") is new_name("every.held_out") is new_name("") is None
    content = {"held_out": {"every": 3}, "eval": {"sequences": 8}, "saving": {"keep": 1}, "x": []}
    before = json.dumps(content)
    assert flatten(translate(content)) == {
        **{"eval.every": 3, "eval.sequences": 8, "checkpoint.keep_last": 1, "x": []}
    }
    assert json.dumps(content) == before


@pytest.mark.parametrize("plus", ["", "+", "++", "~"])
def test_an_old_key_on_the_command_line_names_the_new_one(renamed, plus):
    problems = problems_of(
        compose, "train", [f"{plus}batch.size=64", "held_out.every=2", "seed=-1"]
    )
    assert str(problems["batch.size"]) == (
        "batch.size=64: was renamed\n    remedy: write batch.tokens"
    )
    assert problems["held_out.every"].remedy == "write eval.every"
    assert "seed" in problems


def test_an_old_key_is_found_wherever_overrides_are(renamed, arguments, tmp_path, capsys):
    own = "arms={a: ['model.share=0.5'], b: []}"
    assert "a: model.share" in problems_of(compose_arms, [*arguments, f"+{own}"])
    space = ["space.model.share=interval(0.2,1)", "study=q"]
    problems = problems_of(compose_search, [*arguments, *space])
    assert problems["space.model.share"].remedy == "write space.model.capacity"
    assert "batch.size" in problems_of(compose_submission, ["train", "name=x", "batch.size=8"])
    assert cli.main(["train", "-m", *arguments, "name=s", "model.share=0.25,0.5"]) == 2
    assert "model.share=0.25,0.5: was renamed" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_old_keys_in_a_users_files_are_named_all_at_once(renamed, tmp_path):
    for name, text in {
        "experiment/mine.yaml": "# @package _global_\nmodel: {share: 0.5}\nheld_out: {every: 2}\n",
        "batch/mine.yaml": "size: 64\n",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    problems = problems_of(compose, "train", ["experiment=mine"], str(tmp_path))
    assert problems.keys() == {"model.share", "held_out.every", "batch.size"}
    assert problems["model.share"].value == 0.5
    assert problems["model.share"].reason == "was renamed (in experiment/mine.yaml)"
    assert problems["held_out.every"].remedy == "write eval.every"


@pytest.mark.slow
@pytest.mark.usefixtures("no_stop_request")
def test_a_run_that_stored_old_keys_resumes(renamed, arguments, monkeypatch):
    arguments = [*arguments, "name=r", "model.capacity=0.5", "checkpoint.keep_last=3"]
    assert cli.main(["train", *arguments]) == 0
    run = RunDirectory(Path("runs/r"))
    stored = run.read_config()
    use_old_keys(run.config)
    manifest = json.loads(run.manifest.read_text())
    checkpoint = manifest["starts"][-1]["checkpoint"]
    manifest["starts"][-1]["checkpoint"] = {"keep": checkpoint.pop("keep_last"), **checkpoint}
    run.manifest.write_text(json.dumps(manifest))
    monkeypatch.setitem(RENAMED_KEYS, "checkpoint.keep", "checkpoint.keep_last")
    assert run.retention().keep_last == 3
    assert run.read_config() == stored
    run.completed_mark.unlink()
    assert read_run(run.path, "r").steps == 4
    again = compose("train", arguments)
    check_resumable(again, resolve(again)[0])
    changed = compose("train", [*arguments, "model.capacity=0.25"])
    with pytest.raises(OtherRunError, match=r"model.capacity: 0.5 in the run, 0.25 now"):
        check_resumable(changed, resolve(changed)[0])
    assert cli.main(["train", *arguments]) == 0
    assert cli.main(["eval", "run=r", "sequences=8"]) == 0
    assert cli.main(["checkpoints", "run=r"]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("no_stop_request")
def test_a_sweep_that_stored_old_keys_resumes(renamed, arguments, capsys):
    command = ["train", "-m", *arguments, "name=s", "model.capacity=0.25,0.5"]
    assert cli.main(command) == 0
    listed = Path("runs/s/sweep.json")
    listed.write_text(listed.read_text().replace("model.capacity", "model.share"))
    for share in ("0.25", "0.5"):
        old = Path(f"runs/s/model.capacity={share}").rename(f"runs/s/model.share={share}")
        use_old_keys(old / "config.yaml")
        config = old / "config.yaml"
        config.write_text(config.read_text().replace("model.capacity=", "model.share="))
    capsys.readouterr()
    assert cli.main(command) == 0
    assert "2 jobs, 0 to train" in capsys.readouterr().out
    assert cli.main(["status", "sweep=s"]) == 0
    assert "model.share" not in capsys.readouterr().out.replace("model.share=", "")


@pytest.mark.slow
@pytest.mark.usefixtures("no_stop_request")
def test_a_search_that_stored_old_keys_resumes_its_trial(renamed, arguments):
    command = [*arguments, "study=q", "trials=1", "space.model.capacity=interval(0.2,1)"]
    search = compose_search(command)
    search.directory.mkdir(parents=True)
    low = search.compose(["model.capacity=0.2"], "q/trial_0000")
    study = open_study(search.directory, search.config, resolve(low)[0])
    (dimension,), _ = parse_space(search.config.space)
    drawn = suggest(study.ask(), dimension)
    journal = search.directory / "study.journal"
    journal.write_text(journal.read_text().replace("model.capacity", "model.share"))
    assert cli.main(["search", *command]) == 0
    assert repr(RunDirectory(Path("runs/q/trial_0000")).read_config().model.capacity) == drawn
    best = json.loads((search.directory / "best.json").read_text())["best"]
    assert [one["parameters"] for one in best] == [{"model.capacity": float(drawn)}]
