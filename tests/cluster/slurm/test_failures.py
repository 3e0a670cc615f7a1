"""Failures of runs on a cluster: each completes by itself, to the same bits, or names its cause."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.cluster.slurm.disturbed import STEPS, overrides, start
from tests.cluster.slurm.failure_cases import CASES, Case
from tests.cluster.slurm.slurm_cluster import cluster_of
from tests.helpers.ranks import on_ranks
from tests.helpers.runs import losses_of
from tests.helpers.runs import run as run_in_process
from tests.helpers.saved import assert_same_bits, newest_tensors

# Their processes wait for one another more than they compute.
AT_A_TIME = 3


@dataclass
class Result:
    """What became of a case."""

    state: str
    restarts: int
    seconds: float
    causes: list[str]
    output: str
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)
    losses: list[dict[int, float]] = field(default_factory=list)


class Matrix:
    """Runs cases beside one another, each on a cluster of its own."""

    def __init__(self, cases: list[Case], prepared: Path, folder: Path) -> None:
        self.prepared, self.folder = prepared, folder
        self._undisturbed: dict[str, Path] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(AT_A_TIME)
        self.futures: dict[str, Future[Result]] = {
            case.name: self._pool.submit(self._run, number, case)
            for number, case in enumerate(cases)
        }

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def undisturbed(self, strategy: str) -> Path:
        """The run that nothing befell, on as many ranks."""
        with self._lock:
            if strategy not in self._undisturbed:
                runs = self.folder / "undisturbed"
                lines = overrides(self.prepared, runs, strategy, strategy)
                assert on_ranks(run_in_process, 2, lines, joins=False) == ["complete"] * 2
                self._undisturbed[strategy] = runs / strategy
            return self._undisturbed[strategy]

    def _run(self, number: int, case: Case) -> Result:
        folder, began = self.folder / f"case-{number}", time.monotonic()
        folder.mkdir()
        with cluster_of(share_mb=case.share_mb, conf=case.conf) as cluster:
            runs = cluster.share / "runs" if case.share_mb else folder / "runs"
            lines = [*overrides(self.prepared, runs, "run", case.strategy), *case.lines]
            job = [f"cluster.launcher={case.launcher}", *case.job]
            directory = cluster.seen(runs / "run")
            run = start(cluster, lines, folder, directory, case.faults, job, case.tasks)
            case.act(run)
            states, restarts = run.ended(), run.restarts()
            result = Result(
                " ".join(sorted(set(states))),
                max(restarts),
                time.monotonic() - began,
                [line[3] for line in run.failures()],
                run.output(),
            )
            for directory in run.runs:
                if (directory / "COMPLETED").exists():
                    result.weights.append(newest_tensors(directory, STEPS))
                    result.losses.append(losses_of(directory))
        return result


@pytest.fixture(scope="module")
def matrix(
    slurm_possible: None,
    prepared: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Matrix]:
    wanted = [
        item.callspec.params["case"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == NAME
    ]
    results = Matrix(wanted, prepared, tmp_path_factory.mktemp("failures"))
    yield results
    results.close()


NAME = "test_a_disturbed_run_comes_to_the_same_end"


@pytest.mark.on_commit("raises", "power, mid-step", "preempted mid-save", "time limit")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_disturbed_run_comes_to_the_same_end(case, matrix, record_property):
    result = matrix.futures[case.name].result()
    row = [case.name, case.did, f"{case.strategy}, {case.launcher}", str(result.restarts)]
    ended = "complete" if result.weights else f"{result.state}: {result.causes[-1:]}"
    record_property("failure", [*row, ended, f"{result.seconds:.0f}"])
    print(result.output)
    assert result.state == case.ends
    assert case.restarts in (None, result.restarts)
    if case.causes is not None:
        assert len(result.causes) == len(case.causes), result.causes
        assert all(map(str.__contains__, result.causes, case.causes)), result.causes
    if result.restarts and case.faults[0]["step"] >= 8:
        # From the beginning it would come to the same bits.
        assert "resumes from step" in result.output
    if case.ends == "COMPLETED":
        whole = matrix.undisturbed(case.strategy)
        assert len(result.weights) == max(1, len(case.tasks))
        for weights, losses in zip(result.weights, result.losses, strict=True):
            assert_same_bits(newest_tensors(whole, STEPS), weights)
            assert losses == losses_of(whole)
