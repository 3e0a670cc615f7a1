"""The Slurm that the tests are run on: it does what it is used for."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.slurm import slurm_cluster
from tests.cluster.slurm.slurm_cluster import ENDED, cluster_of, wait_until

SLEEPER = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append --output={output}
echo "start ${{SLURM_RESTART_COUNT:-0}} on $SLURM_JOB_NODELIST"
srun --overlap bash -c 'echo awake; sleep {seconds}'
"""


def script(tmp_path: Path, seconds: float) -> str:
    return SLEEPER.format(output=tmp_path / "slurm-%j.out", seconds=seconds)


@pytest.mark.quick
@pytest.mark.skipif(not slurm_cluster.is_installed(), reason="the slow tests install Slurm")
def test_a_job_runs_on_nodes_of_their_own(cluster, tmp_path):
    job = cluster.sbatch(
        "#!/bin/bash\nsrun hostname", "--nodes=3", f"--output={tmp_path}/%j", "--gpus-per-node=2"
    )
    assert cluster.wait(job, timeout=30) == "COMPLETED"
    assert sorted(cluster.output(job).split()) == cluster.nodes
    assert cluster.details(job)["ExitCode"] == "0:0"


@pytest.mark.nightly
def test_a_failed_job_is_told_from_a_complete_one(cluster, tmp_path):
    job = cluster.sbatch("#!/bin/bash\necho no; exit 3", f"--output={tmp_path}/%j")
    assert cluster.wait(job) == "FAILED"
    with pytest.raises(AssertionError, match="no"):
        cluster.wait(job, "COMPLETED")
    assert cluster.state(job) in ENDED


@pytest.mark.nightly
def test_a_node_without_power_is_gone_and_comes_back(cluster, tmp_path):
    job = cluster.sbatch(script(tmp_path, 60), "--nodelist=node2,node3")
    cluster.wait(job, "RUNNING")
    cluster.kill_node("node3")
    assert cluster.on("node3", "true").returncode
    # Slurm sees it after a time-out, and has the job wait for other nodes.
    cluster.wait(job, "PENDING", timeout=60)
    cluster.start_node("node3")
    cluster.wait_for_nodes()


@pytest.mark.nightly
def test_daemons_die_and_come_back_while_a_job_goes_on(cluster, tmp_path):
    job = cluster.sbatch(script(tmp_path, 4), "--nodelist=node1,node2")
    # A running job may still be asking for its step of two tasks.
    wait_until(lambda: cluster.output(job).count("awake") == 2, 60, lambda: cluster.output(job))
    cluster.kill_slurmd("node2")
    cluster.kill_controller()
    assert cluster.run("squeue", check=False).returncode
    cluster.start_controller()
    cluster.start_slurmd("node2")
    assert cluster.wait(job, timeout=60) == "COMPLETED"
    assert cluster.output(job).count("start") == 1
    cluster.wait_for_nodes()


@pytest.mark.nightly
def test_a_job_of_high_priority_takes_the_nodes(cluster, tmp_path):
    low = cluster.sbatch(script(tmp_path, 60), "--nodes=3")
    cluster.wait(low, "RUNNING")
    high = cluster.sbatch(script(tmp_path, 1), "--partition=high", "--nodes=3", "--exclusive")
    assert cluster.wait(high) == "COMPLETED"
    # It ended by the signal within its time of grace: Slurm requeues only what it has to kill.
    assert cluster.wait(low) == "FAILED"


@pytest.mark.nightly
def test_a_shared_file_system_is_full_frozen_or_gone_for_a_while(slurm_possible):
    with cluster_of(2, share_mb=16) as cluster:
        write = ("bash", "-c", f"echo here >{cluster.share}/file && cat {cluster.share}/file")
        assert cluster.on("node1", *write).stdout == "here\n"
        assert cluster.on("node2", "cat", f"{cluster.share}/file").stdout == "here\n"
        large = ("head", "-c", "64K", "/dev/zero")
        fill = ("bash", "-c", f"{' '.join(large)} >{cluster.share}/large")
        with cluster.share_full():
            assert "No space left" in cluster.on("node1", *fill).stderr
        assert cluster.on("node1", *fill).returncode == 0
        assert cluster.on("node1", *write).stdout == "here\n"
        with cluster.share_gone():
            assert "Read-only" in cluster.on("node1", *write).stderr
            assert cluster.on("node2", "ls", str(cluster.share)).stdout == ""
        assert cluster.on("node2", *write).stdout == "here\n"
        writing = subprocess.Popen(
            [slurm_cluster.MINISLURM, "on", "node1", *write], env=cluster._environment
        )
        with cluster.share_frozen():
            pass
        assert writing.wait(20) == 0
        with cluster.share_frozen():
            touched = ["timeout", "0.5", "touch", f"{cluster.share}/more"]
            started = subprocess.Popen(
                [slurm_cluster.MINISLURM, "on", "node1", *touched], env=cluster._environment
            )
            time.sleep(1)
            assert started.poll() is None
        started.wait(20)


def test_it_ends_with_whoever_started_it(slurm_possible):
    """Even where that is killed, no process or device is left."""
    code = (
        "from slurm_cluster import cluster_of; import time\n"
        "with cluster_of(1, share_mb=16) as c: print(c.directory, flush=True); time.sleep(60)"
    )
    folder = str(Path(slurm_cluster.__file__).parent)
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": folder},
    )
    assert owner.stdout is not None
    directory = Path(owner.stdout.readline().strip())
    login = Path("/proc") / (directory / "login.pid").read_text().split()[0]
    assert login.exists()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    try:
        wait_until(lambda: not login.exists(), 10)
        devices = ["losetup", "-n", "-O", "BACK-FILE"]
        held = subprocess.run(devices, check=True, capture_output=True, text=True).stdout
        assert str(directory) not in held
    finally:
        environment = {**os.environ, "MINISLURM_DIR": str(directory)}
        subprocess.run([slurm_cluster.MINISLURM, "down"], env=environment, check=True)
        shutil.rmtree(directory)
