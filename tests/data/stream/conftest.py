"""What the tests of this folder share."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A prepared directory to damage."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))
