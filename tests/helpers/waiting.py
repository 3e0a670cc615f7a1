"""Waiting for what another process does."""

import time
from collections.abc import Callable
from typing import Any


def wait_until(
    is_so: Callable[[], Any], timeout: float = 240, text: Callable[[], str] = str
) -> Any:
    """Wait until ``is_so()`` is true and return it; where it is not in time, fail with a text."""
    deadline = time.monotonic() + timeout
    while not (result := is_so()):
        assert time.monotonic() < deadline, text()
        time.sleep(0.05)
    return result
