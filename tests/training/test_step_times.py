"""A process that is slower than the others is named, whatever the others wait for."""

import json
import time
from pathlib import Path

import pytest

from modtrain.common.reading import UnreadableError
from modtrain.training import step_times
from modtrain.training.step_times import (
    SLOW_NODES,
    STEP_TIMES,
    StragglerDetector,
    read_slow_nodes,
    record_step_times,
    write_slow_nodes,
)
from tests.helpers.ranks import on_ranks
from tests.helpers.runs import run, run_lines


def records(*factors: float, what: str = "forward", step_seconds: float = 1.0) -> list[list[str]]:
    """What a detector reports at each record: rank 2 of 4 takes so much longer."""
    detector = StragglerDetector(["a", "a", "b", "b"])
    return [
        [
            str(slow)
            for slow in detector.update(step, step_seconds, {what: [0.5, 0.5, 0.5 * f, 0.5]})
        ]
        for step, f in enumerate(factors)
    ]


def test_a_rank_that_stays_slow_is_reported_once():
    line = "b (rank 2) takes for a forward pass 2 times as long as the others"
    assert records(2, 2, 2, 2) == [[], [], [line], []]
    assert records(2, 2, 1, 2, 2) == [[]] * 5
    assert records(2, 2, 2, 1, 2, 2, 2)[-1] == [line]


def test_what_does_not_matter_to_the_step_is_no_straggler():
    assert records(2, 2, 2, step_seconds=100) == [[]] * 3
    # A product is a measure of the device, and no part of the step.
    assert records(2, 2, 2, step_seconds=100, what="product")[-1]
    assert records(1.2, 1.2, 1.2) == [[]] * 3


def test_of_two_ranks_the_slower_one_is_named():
    detector = StragglerDetector(["a", "b"])
    for step in range(3):
        slow = detector.update(step, 1.0, {"data": [0.1, 0.9]})
    assert [(one.node, one.since) for one in slow] == [("b", 0)]


def test_what_is_slow_is_noted_until_nothing_is(tmp_path):
    detector = StragglerDetector(["a", "b"])
    for step in range(3):
        detector.update(step, 1.0, {"data": [0.1, 0.9]})
    write_slow_nodes(tmp_path, 2, detector.slow)
    assert read_slow_nodes(tmp_path) == detector.slow
    write_slow_nodes(tmp_path, 3, [])
    assert read_slow_nodes(tmp_path) == []
    (tmp_path / SLOW_NODES).write_text('{"slow": [{"what": "data"}]}')
    with pytest.raises(UnreadableError):
        read_slow_nodes(tmp_path)


def test_the_records_do_not_grow_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(step_times, "_MAX_BYTES", 400)
    for step in range(20):
        record_step_times(tmp_path, step, ["a", "b"], {"data": [0.25, 0.5]})
    assert sorted(path.name for path in tmp_path.iterdir()) == [STEP_TIMES, f"{STEP_TIMES}.1"]
    assert all(path.stat().st_size < 600 for path in tmp_path.iterdir())
    last = json.loads((tmp_path / STEP_TIMES).read_text().splitlines()[-1])
    assert last == {"step": 19, "nodes": {"a": [0], "b": [1]}, "data_seconds": [0.25, 0.5]}


def with_a_slow_rank(lines: list[str], printed: str) -> str:
    import os
    import sys

    from modtrain.training.module import LanguageModule

    rank, original = os.environ["RANK"], LanguageModule.training_step
    os.environ["SLURMD_NODENAME"] = f"node{rank}"

    def training_step(self, batch, batch_idx):
        if rank == "1":
            time.sleep(0.3)
        return original(self, batch, batch_idx)

    LanguageModule.training_step = training_step
    with Path(f"{printed}-{rank}").open("w") as sys.stdout:
        return run(lines)


@pytest.mark.slow
def test_a_slow_rank_of_a_run_is_named(prepared, tmp_path):
    lines = [*run_lines(prepared, tmp_path, "x"), "strategy=ddp", "log.every=1", "budget.steps=5"]
    printed = str(tmp_path / "printed")
    assert on_ranks(with_a_slow_rank, 2, lines, printed, joins=False) == ["complete"] * 2
    (slow,) = [one for one in read_slow_nodes(tmp_path / "x") if one.what == "forward"]
    assert (slow.rank, slow.node) == (1, "node1")
    lines = (tmp_path / "x" / STEP_TIMES).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    last = json.loads(lines[-1])
    assert last["nodes"] == {"node0": [0], "node1": [1]}
    assert last["forward_seconds"][1] > 0.3
    # Both have waited for it: it is not to be seen in the step's own time.
    text = (tmp_path / "printed-0").read_text()
    assert "warning: step 3: node1 (rank 1) takes for a forward pass" in text
