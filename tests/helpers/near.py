"""Values of ranks against those of one process."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def assert_near(
    actual: Mapping[str, Any], expected: Mapping[str, Any], where: str = "", atol: float = 1e-5
) -> None:
    """Numbers and arrays by name are equal to within ``atol``. pytest.approx takes far longer."""
    assert actual.keys() == expected.keys(), where
    for name, value in expected.items():
        np.testing.assert_allclose(
            actual[name], value, rtol=0, atol=atol, equal_nan=False, err_msg=f"{where} {name}"
        )
