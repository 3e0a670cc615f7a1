"""A run that starts from an imported one wants its prompts as that one does."""

from types import SimpleNamespace

import pytest

from modtrain.common.errors import CheckpointError
from modtrain.training.run_directory import RunDirectory
from modtrain.training.starting_point import find
from modtrain.training.starting_point.find import Parent, inherit_prompt_format


@pytest.fixture
def config(monkeypatch):
    """Of a run whose tokenizer is that of its parent, while ``differs`` is empty."""
    config = SimpleNamespace(differs="")
    monkeypatch.setattr(find, "tokenizer_mismatch", lambda config, *_: config.differs)
    monkeypatch.setattr(RunDirectory, "read_config", lambda _: None)
    return config


def test_the_prompt_format_of_another_tokenizer_is_not_taken(tmp_path, config, caplog):
    parent, run = RunDirectory(tmp_path / "parent"), RunDirectory(tmp_path / "run")
    for directory in (parent, run):
        directory.path.mkdir()
    parent.prompt_format.write_bytes(b"{}")
    config.differs = "tokenizer: data has another one than there"
    inherit_prompt_format(Parent("init", str(parent.path), 0, ""), run, config)
    assert not run.prompt_format.exists()
    assert "not taken over: tokenizer: data has another one" in caplog.text


def test_the_prompt_format_is_that_of_the_parent(tmp_path, config):
    parent, run = RunDirectory(tmp_path / "parent"), RunDirectory(tmp_path / "run")
    parent.path.mkdir()
    run.path.mkdir()
    origin = Parent("init", str(parent.path), 0, "")
    inherit_prompt_format(None, run, config)
    inherit_prompt_format(origin, run, config)
    assert not run.prompt_format.exists()
    parent.prompt_format.write_bytes(b'{"begin_ids": []}')
    inherit_prompt_format(origin, run, config)
    assert run.prompt_format.read_bytes() == b'{"begin_ids": []}'
    parent.prompt_format.unlink()
    parent.prompt_format.mkdir()
    with pytest.raises(CheckpointError, match="import that run again"):
        inherit_prompt_format(origin, run, config)
