"""What a configuration is refused for."""

from collections.abc import Callable

import pytest

from modtrain.common.errors import ConfigError, Problem


def problems_of(call: Callable[..., object], *arguments, **options) -> dict[str, Problem]:
    """Call what raises a `ConfigError`, and return its problems by their keys, which are unique."""
    with pytest.raises(ConfigError) as error:
        call(*arguments, **options)
    by_key = {problem.key: problem for problem in error.value.problems}
    assert len(by_key) == len(error.value.problems)
    return by_key
