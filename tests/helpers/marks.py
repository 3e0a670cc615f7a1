"""Cases of a test that are slow where its others are not."""

from collections.abc import Collection
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_but(quick: Collection[str], names: Collection[str]) -> list[Any]:
    """The names, of which those are slow that are not among the quick ones."""
    return [name if name in quick else slow(name) for name in names]
