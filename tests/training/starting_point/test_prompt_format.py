"""A run that starts from an imported one wants its prompts as that one does."""

import pytest

from modtrain.common.errors import CheckpointError
from modtrain.training.run_directory import RunDirectory
from modtrain.training.starting_point.find import Parent, inherit_prompt_format


def test_the_prompt_format_is_that_of_the_parent(tmp_path):
    parent, run = RunDirectory(tmp_path / "parent"), RunDirectory(tmp_path / "run")
    parent.path.mkdir()
    run.path.mkdir()
    origin = Parent("init", str(parent.path), 0, "")
    inherit_prompt_format(None, run)
    inherit_prompt_format(origin, run)
    assert not run.prompt_format.exists()
    parent.prompt_format.write_bytes(b'{"begin_ids": []}')
    inherit_prompt_format(origin, run)
    assert run.prompt_format.read_bytes() == b'{"begin_ids": []}'
    parent.prompt_format.unlink()
    parent.prompt_format.mkdir()
    with pytest.raises(CheckpointError, match="import that run again"):
        inherit_prompt_format(origin, run)
