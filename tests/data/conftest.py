"""Prepared directories for the tests of the data layer."""

from collections.abc import Callable
from pathlib import Path

import pytest

from modtrain.data.prepare.pipeline import prepare
from tests.data.data_cases import make_documents, tiny_config, write_jsonl


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared directory that tests read and do not change."""
    folder = tmp_path_factory.mktemp("prepared")
    corpus = write_jsonl(folder / "corpus.jsonl", make_documents(200))
    prepare(tiny_config([corpus], folder / "output"), progress=False)
    return folder / "output"


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Split the corpus in units of so many bytes."""

    def set_unit_bytes(num_bytes: int) -> None:
        for name in ("TEXT_UNIT_BYTES", "LINES_UNIT_BYTES", "PARQUET_UNIT_BYTES"):
            monkeypatch.setattr(f"modtrain.data.prepare.units.{name}", num_bytes)

    return set_unit_bytes
