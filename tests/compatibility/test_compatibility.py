"""Runs of earlier versions: evaluated, continued from and resumed by this one."""

import json
import tarfile

import pytest

from tests.compatibility.runs import FOLDER, TRAIN, keys_of, results_of
from tests.parity.__main__ import TOLERANCE
from tests.parity.program import ROOT, Program
from tests.parity.records import differences, fingerprint

COMMITS = sorted(path.stem for path in FOLDER.glob("*.json"))


def test_a_commit_is_given_the_keys_that_it_has(tmp_path):
    today = list(TRAIN["staged_fsdp"])
    assert keys_of(ROOT, today) == today
    # Older than the table of renamed keys.
    changed = set(keys_of(tmp_path, today)) - set(today)
    assert changed == {"model.router.room=1.5"}


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", TRAIN)
@pytest.mark.parametrize("commit", COMMITS)
def test_a_run_of_an_earlier_version_loads(commit, name, tmp_path):
    with tarfile.open(FOLDER / f"{commit}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    expected = json.loads((FOLDER / f"{commit}.json").read_text())
    tolerance = None if expected["machine"] == fingerprint() else TOLERANCE
    recorded, results = expected["runs"][name], results_of(Program(tmp_path), name)
    # Later versions may log more; what was logged has to stay. What it tells of routers and experts
    # was of a step's last micro-batch then, and is of the step now.
    metrics = results["metrics"]
    logged = {k for k in recorded["metrics"] if not k.startswith(("router/", "experts/"))}
    assert recorded["metrics"].keys() <= metrics.keys()
    results["metrics"] = {key: metrics[key] for key in logged}
    recorded["metrics"] = {key: recorded["metrics"][key] for key in logged}
    assert differences(recorded, results, tolerance) == []
