"""Runs and data that are moved or renamed, and runs whose names look like markup."""

import json
import re
from pathlib import Path

import pytest

from modtrain.cli import main as cli

pytestmark = pytest.mark.slow


@pytest.fixture
def at(tiny, tmp_path, monkeypatch):
    """A working directory with the data in ``here``; the overrides of a run of them."""
    monkeypatch.chdir(tmp_path)
    (path,) = [word.partition("=")[2] for word in tiny if word.startswith("data.path=")]
    Path("here").symlink_to(Path(path).resolve())
    others = [word for word in tiny if not word.startswith("data.path=")]
    return [*others, "budget.steps=2", "eval.every=null", "log=jsonl", "checkpoint.every=1"]


def test_the_fingerprint_decides_which_data_are_a_runs_and_paths_may_change(
    at, capsys, monkeypatch
):
    assert cli.main(["train", "name=a", "data.path=here", *at]) == 0
    Path("here").rename("there")
    Path("runs/a").rename("runs/b")
    of_run = ["run=b", "accelerator=cpu"]
    capsys.readouterr()
    assert cli.main(["eval", *of_run, "sequences=4"]) == 1
    assert "the directory in which they are now as data_path=..." in capsys.readouterr().err
    assert cli.main(["eval", *of_run, "sequences=4", "data_path=there"]) == 0
    assert cli.main(["generate", *of_run, "max_tokens=2", "prompt=a", "data_path=there"]) == 0
    assert cli.main(["inspect", *of_run, "sequences=1", "data_path=there"]) == 0
    assert cli.main(["data", "run=b", "step=1", "data_path=there"]) == 0
    # A later start says where they are from then on, from any directory.
    Path("runs/b/COMPLETED").unlink()
    assert cli.main(["train", "name=b", "data.path=there", *at]) == 0
    elsewhere = Path("elsewhere")
    elsewhere.mkdir()
    runs_dir = f"runs_dir={Path('runs').resolve()}"
    monkeypatch.chdir(elsewhere)
    capsys.readouterr()
    assert cli.main(["eval", *of_run, "sequences=4", runs_dir]) == 0


def test_other_data_at_a_new_path_are_refused(at, capsys):
    assert cli.main(["train", "name=a", "data.path=here", *at]) == 0
    manifest = Path("runs/a/manifest.json")
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "data_fingerprint": "0" * 64}))
    Path("runs/a/COMPLETED").unlink()
    capsys.readouterr()
    assert cli.main(["train", "name=a", "data.path=here", *at]) == 1
    assert "was trained on other data" in capsys.readouterr().err
    assert cli.main(["eval", "run=a", "data_path=here", "accelerator=cpu"]) == 1
    assert "here has other data than" in capsys.readouterr().err


def test_a_name_that_looks_like_markup_is_printed_as_it_is(at, capsys):
    name = "[v1] x[/c] :fire:"
    command = ["train", f'name="{name}"', "data.path=here", *at]
    for ending in ("is complete: 2 steps", "is complete: nothing to train"):
        assert cli.main(command) == 0
        assert re.search(re.escape(f"runs/{name} ") + ending, capsys.readouterr().out)
    for action in ("list", "consolidate"):
        assert cli.main(["checkpoints", f'run="{name}"', f"action={action}"]) == 0
        assert f"runs/{name}/" in capsys.readouterr().out
    assert cli.main(["status"]) == 0
    assert name in capsys.readouterr().out


def test_only_plain_consoles_are_made():
    root = Path(cli.__file__).parents[1]
    made = [p for p in root.rglob("*.py") if re.search(r"(?<!plain_)\bConsole\(", p.read_text())]
    assert made == []
