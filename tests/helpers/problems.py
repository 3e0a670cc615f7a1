"""What a configuration is refused for."""

from collections.abc import Callable

import pytest

from modtrain.common.errors import ConfigError, Problem


def problems_of(call: Callable[..., object], *arguments, **options) -> dict[str, Problem]:
    """Call what raises a `ConfigError`, and return its problems, each told once, by their keys."""
    with pytest.raises(ConfigError) as error:
        call(*arguments, **options)
    found = {problem.key: problem for problem in error.value.problems}
    assert len(found) == len(error.value.problems)
    return found
