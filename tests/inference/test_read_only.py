"""Runs in directories that cannot be written: what is computed is not lost."""

import os
from pathlib import Path

import pytest

from modtrain.cli import main as cli
from modtrain.inference import text_io

pytestmark = pytest.mark.slow


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_read_only_run_is_evaluated_and_inspected(start, tmp_path, monkeypatch, capsys, caplog):
    run = start("read_only", "budget.steps=1")
    before = content(run.path)
    words = ["run=read_only", f"runs_dir={run.path.parent}", "accelerator=cpu", "sequences=2"]
    access = os.access
    monkeypatch.setattr(
        text_io.os, "access", lambda path, mode: Path(path) != run.path and access(path, mode)
    )
    capsys.readouterr()
    assert cli.main(["eval", *words]) == 0
    assert "causal loss" in capsys.readouterr().out
    assert "is read-only: results are printed alone; output=DIR keeps them" in caplog.text
    output = tmp_path / "results" / "here"
    assert cli.main(["eval", *words, f"output={output}"]) == 0
    assert (output / "eval-000000001.json").is_file()
    assert any((output / "tensorboard").rglob("events.*"))
    assert cli.main(["inspect", *words]) == 2
    assert "give output=page.html" in capsys.readouterr().err
    assert cli.main(["inspect", *words, f"output={tmp_path}/page.html"]) == 0
    assert content(run.path) == before


def test_an_output_that_cannot_be_made_is_refused_before_anything_is_computed(
    start, tmp_path, monkeypatch, capsys
):
    run = start("writable", "budget.steps=1")
    (tmp_path / "file").touch()
    from modtrain.inference.evaluate import evaluate as module

    monkeypatch.setattr(module, "_evaluation", None)
    words = ["run=writable", f"runs_dir={run.path.parent}", "accelerator=cpu"]
    assert cli.main(["eval", *words, f"output={tmp_path}/file/x"]) == 2
    assert "cannot be made: Not a directory" in capsys.readouterr().err
