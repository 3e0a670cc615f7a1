"""Slurm as sites have it: accounts, limits of a QOS, several users, and cgroups."""

import fcntl
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm.slurm_cluster import (
    ROOT,
    Cluster,
    cluster_of,
    missing_accounting,
    process_tracking,
)
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.nightly

USERS = ("alice", "bob")
LONG = ["budget.steps=100000", "checkpoint.every=200", "eval.every=100000", "log.every=50"]
# Of partitions.
LIMITS = {"closed": "AllowAccounts=closed", "better": "AllowQos=short", "short": "MaxTime=5"}


@pytest.fixture(scope="module")
def site() -> Iterator[Cluster]:
    """Three nodes; Slurm's own time between SIGTERM and SIGKILL; account ``closed`` for nobody."""
    if (reason := missing_accounting()) is not None:
        pytest.skip(f"no Slurm with accounting here: {reason}")
    # Nodes of two clusters have the same cgroups.
    with Path("/tmp/.minislurm-cgroup").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with cluster_of(conf="KillWait=30\n", users=USERS) as running:
            running.run("sacctmgr", "-iQ", "add", "account", "closed")
            for name, limit in (("two", "MaxSubmitJobsPerUser=2"), ("short", "MaxWall=5")):
                running.run("sacctmgr", "-iQ", "add", "qos", name, "set", limit)
            running.run("sacctmgr", "-iQ", "modify", "account", "lab", "set", "qos+=two,short")
            yield running


@pytest.fixture(autouse=True)
def nothing_is_queued(site: Cluster) -> Iterator[None]:
    yield
    site.cancel_all()


@pytest.fixture
def desk(site: Cluster, prepared: Path, tmp_path: Path) -> Path:
    """A directory of alice's, with data that she may read."""
    folder = site.home("alice") / tmp_path.name
    shutil.copytree(prepared, folder / "shards")
    subprocess.run(["chown", "-R", "61001:61001", folder], check=True)
    return folder


@pytest.fixture
def job(words: list[str], desk: Path) -> list[str]:
    return [*words, f"data.path={desk}/shards"]


def submit(site: Cluster, cwd: Path, *words: str, user: str = "alice", **options: object) -> str:
    return site.modtrain(cwd, "submit", *words, user=user, **options)


def number_of(output: str) -> str:
    return output.partition("submitted job ")[2].split(maxsplit=1)[0]


def queue(site: Cluster) -> str:
    return site.run("squeue", "--noheader").stdout


def test_a_user_trains_under_an_account(site, desk, job):
    number = number_of(submit(site, desk, *job))
    site.wait(number, "COMPLETED")
    run = desk / "runs/x"
    assert (run / "COMPLETED").stat().st_uid == 61001
    assert site.details(number)["Account"] == "lab"
    recorded = f"sacct -X -n -P -j {number} -o State,Account,User".split()
    wait_until(lambda: site.run(*recorded).stdout.strip() == "COMPLETED|lab|alice")
    # Another user may not end her jobs.
    with pytest.raises(AssertionError, match="Permission denied"):
        other = number_of(submit(site, desk, *job, "name=y", *LONG))
        site.modtrain(desk, "cancel", "run=y", user="bob")
    assert site.state(other) in ("PENDING", "RUNNING")


def test_nodes_are_free_soon_after_a_requeue(site, desk, job):
    """The step's processes are in cgroups; what outlives the script keeps nodes for KillWait."""
    if process_tracking() != "cgroup":
        pytest.skip("cgroup v1's freezer is not mounted to be written: no cgroup process tracking")
    number = number_of(submit(site, desk, *job, *LONG))
    wait_until((desk / "runs/x/metrics.jsonl").is_file)
    site.run("scancel", "--batch", "--signal=USR1", number)
    wait_until(lambda: "requeued" in site.output(number))
    began = time.monotonic()
    wait_until(lambda: site.state(number) in ("PENDING", "RUNNING"))
    wait_until(lambda: "completing" not in site.run("sinfo", "-h", "-o", "%T").stdout)
    assert time.monotonic() - began < 15
    wait_until(lambda: site.details(number)["Restarts"] == "1")


def test_a_chain_that_a_qos_has_no_room_for_leaves_no_job(site, desk, job):
    # A job that began would see by itself that it is withdrawn.
    later = "cluster.options=['--begin=now+3600']"
    with pytest.raises(AssertionError) as refused:
        submit(site, desk, *job, "chain=4", "cluster.qos=two", later)
    message = str(refused.value)
    assert "that was job 3 of chain=4" in message
    assert ": withdrawn" in message
    wait_until(lambda: not queue(site))
    assert not (desk / "runs/x/COMPLETED").exists()
    # What is withdrawn does not count any more.
    site.wait(number_of(submit(site, desk, *job, "chain=2", "cluster.qos=two")), "COMPLETED")


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["cluster.partition=closed"], "cluster.account"),
        (["cluster.partition=better"], "cluster.qos"),
        (["cluster.partition=short"], "lower time="),
        (["cluster.qos=short"], "lower time=, or choose another cluster.qos"),
        (["cluster.account=closed"], "sacctmgr show associations"),
        (["cluster.qos=none_such"], "cluster.qos"),
    ],
    ids=[
        *("partition closed to the account", "partition closed to the QOS", "partition's limit"),
        *("limit of the QOS", "account", "QOS"),
    ],
)
def test_what_can_never_start_is_refused(site, desk, job, overrides, remedy):
    key, _, name = overrides[0].partition("=")
    if key == "cluster.partition":
        site.run("scontrol", "create", f"PartitionName={name}", "Nodes=ALL", LIMITS[name])
    with pytest.raises(AssertionError) as refused:
        submit(site, desk, *job, *overrides)
    assert "remedy: " in str(refused.value)
    assert remedy in str(refused.value).split("remedy: ")[1]
    wait_until(lambda: not queue(site))


def test_another_users_checkout_has_its_version(site, desk, job):
    """Bob trains with the code of alice, which she has changed."""
    checkout = desk / "modtrain"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", checkout], check=True)
    with (checkout / "modtrain/__init__.py").open("a") as file:
        file.write("# changed by alice\n")
    subprocess.run(["chown", "-R", "61001:61001", checkout], check=True)
    git = ("git", "-C", checkout, "rev-parse", "HEAD")
    commit = site.run(*git, user="alice").stdout.strip()
    assert "dubious ownership" in site.run(*git, user="bob", check=False).stderr
    cwd = site.home("bob")
    environment = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    number = number_of(submit(site, cwd, *job, user="bob", env=environment))
    site.wait(number, "COMPLETED")
    manifest = json.loads((cwd / "runs/x/manifest.json").read_text())
    code = manifest["starts"][0]["code"]
    assert code["commit"] == commit
    assert "+# changed by alice" in code["diff"]
