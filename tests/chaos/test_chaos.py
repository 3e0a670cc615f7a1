"""The promises under random interruptions, and that a broken one is noticed."""

import json

import pytest

from tests.chaos import trial
from tests.chaos.__main__ import play
from tests.chaos.trial import PROMISES
from tests.helpers.runs import losses_of


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_no_promise_is_broken_by_two_hundred_interruptions(tmp_path):
    tally = play(tmp_path, seed=0, interruptions=200, minutes=90)
    assert not tally.broken, "\n".join(f"{PROMISES[name]}: {where}" for name, where in tally.broken)
    assert all(tally.tried[name] for name in PROMISES)


def falsify_a_loss(run, _draw):
    """What no promise allows for."""
    file = run / "metrics.jsonl"
    if not file.is_file() or 1 not in losses_of(run):
        return False
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        if record["step"] == 1 and "loss" in record:
            record["loss"] += 0.1
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return True


@pytest.mark.nightly
def test_a_broken_promise_is_reported_with_its_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "DAMAGES", (falsify_a_loss,))
    monkeypatch.setattr(trial, "LAYOUTS", {"single": trial.LAYOUTS["single"]})
    tally = play(tmp_path, seed=3, interruptions=4, minutes=10, per_run=4)
    assert ("losses", True) in {(name, "seed 3: single" in where) for name, where in tally.broken}
