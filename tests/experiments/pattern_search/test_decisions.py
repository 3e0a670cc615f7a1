"""Decisions: a function of the results alone, and the same after a restart."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from modtrain.common.errors import CheckpointError, OtherRunError
from modtrain.experiments.pattern_search.decisions import DecisionLog, decide, num_survivors
from tests.experiments.pattern_search.search_cases import candidates
from tests.helpers.model_cases import quick

BUDGETS = [1e9, 3e9, 9e9]


def points_of(entries):
    return {c.name: (4 - c.flops_over_dense, c.flops_over_dense) for c in entries}


@quick(50)
@given(st.integers(1, 300), st.integers(1, 100))
@example(100, 7)  # 0.07 x 100 is 7.000000000000001
def test_a_share_of_the_candidates_continues_and_at_least_one(count, percent):
    survivors = num_survivors(percent / 100, count)
    assert survivors == max(1, -(-percent * count // 100))


def test_a_decision_does_not_depend_on_the_order_of_the_results():
    points = points_of(candidates())
    turned = dict(reversed(points.items()))
    failed = {"c001": "x", "c000": "y"}
    one = decide(1e9, 0.5, points, failed)
    two = decide(1e9, 0.5, turned, dict(reversed(failed.items())))
    # To the byte as it is written.
    assert json.dumps(asdict(one)) == json.dumps(asdict(two))
    assert len(one.survivors) == 5
    assert one.survivors == sorted(one.survivors)


def test_decisions_are_read_as_they_were_written(tmp_path):
    entries = candidates()
    log = DecisionLog(tmp_path / "rungs.json", entries, BUDGETS, 0.5)
    first = decide(BUDGETS[0], 0.5, points_of(entries), {})
    log.write(first)
    second = decide(BUDGETS[1], 0.5, {n: first.points[n] for n in first.survivors}, {"c001": "x"})
    log.write(second)
    again = DecisionLog(tmp_path / "rungs.json", entries, BUDGETS, 0.5)
    assert again.decisions == [first, second]
    # A later budget continues the search.
    longer = DecisionLog(tmp_path / "rungs.json", entries, [*BUDGETS, 1e11], 0.5)
    assert longer.decisions == [first, second]


@pytest.mark.parametrize("changed", ["candidates", "more", "budgets", "fewer", "keep"])
def test_decisions_of_another_search_are_refused(tmp_path, changed):
    entries = candidates()
    path, budgets, keep = tmp_path / "rungs.json", BUDGETS, 0.5
    log = DecisionLog(path, entries, budgets, keep)
    log.write(decide(BUDGETS[0], 0.5, points_of(entries), {}))
    if changed == "candidates":
        entries = [replace(entries[0], capacities=(1.0,) * 7 + (0.5,)), *entries[1:]]
    elif changed == "more":
        entries = candidates(num_drawn=10)
    elif changed in ("budgets", "fewer"):
        budgets = [2e9] if changed == "budgets" else []
    else:
        keep = 0.25
    with pytest.raises(OtherRunError) as error:
        DecisionLog(path, entries, budgets, keep)
    name = {"candidates": "c000", "more": "c009", "fewer": "budgets"}.get(changed, changed)
    assert f"  {name}: " in str(error.value)
    assert "remedy" in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"candidates": {}, "rungs": [{}]})])
def test_a_file_that_is_no_list_of_decisions_is_named(tmp_path, text):
    path = tmp_path / "rungs.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"rungs\.json cannot be read"):
        DecisionLog(path, candidates(), BUDGETS, 0.5)
