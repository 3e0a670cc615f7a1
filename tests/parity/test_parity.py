"""Results of small runs, by the command line alone, against recorded ones."""

import math

import pytest

from tests.parity.__main__ import check
from tests.parity.cases import CASES
from tests.parity.records import differences


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_results_are_as_recorded():
    assert check(list(CASES), None) == []


@pytest.mark.parametrize(
    ("now", "exact", "is_near"),
    [
        ({"loss": [1.0, 2.0], "weights": "ab"}, 0, 0),
        ({"loss": [1.0, math.nextafter(2.0, 3.0)], "weights": "cd"}, 2, 0),
        ({"loss": [1.0, 2.1], "weights": "ab"}, 1, 1),
        ({"loss": [1.0, math.nan], "weights": "ab"}, 1, 1),
        ({"loss": [1.0], "weights": "ab"}, 1, 1),
        ({"weights": "ab", "norm": 1.0}, 2, 2),
    ],
)
def test_differences_are_listed(now, exact, is_near):
    recorded = {"loss": [1.0, 2.0], "weights": "ab"}
    assert len(differences(recorded, now, None)) == exact
    assert len(differences(recorded, now, 1e-5)) == is_near
