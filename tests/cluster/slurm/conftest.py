"""A real Slurm for the tests of this folder: all of them are slow, but for those marked `quick`."""

import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.cluster.slurm.slurm_cluster import PATIENCE, Cluster, cluster_of, missing

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: runs with the quick tests, on the real Slurm or off")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            if item.get_closest_marker("quick") is None:
                item.add_marker(pytest.mark.slow)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(3 * PATIENCE))


@cache
def why_not() -> str | None:
    reason = missing()
    if reason is not None:
        warnings.warn(
            pytest.PytestWarning(f"NOTHING WAS TESTED ON A REAL SLURM: {reason}"), stacklevel=2
        )
    return reason


@pytest.fixture(scope="session")
def slurm_possible() -> None:
    """Skip where no cluster can be had, with the reason."""
    if (reason := why_not()) is not None:
        pytest.skip(f"no real Slurm here: {reason}")


@pytest.fixture(scope="session")
def cluster(slurm_possible: None) -> Iterator[Cluster]:
    """A Slurm of three nodes with 8 fake GPUs each, started on demand, one for each worker."""
    # Slurm's own: who ends a job leaves it the time to save, which a busy machine needs.
    with cluster_of(conf="KillWait=30\n") as running:
        yield running


@pytest.fixture
def words(tiny) -> list[str]:
    """A run of two processes on two nodes."""
    return [
        *("train", "name=x", *tiny, "strategy=ddp", "batch.tokens=512", "log.progress=false"),
        *("cluster=cpu", "nodes=2", "time=30", "cluster.lead=60", "cluster.retry_delay=1"),
    ]


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Cancel what a test has left in the queue."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").cancel_all()
