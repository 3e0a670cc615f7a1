"""The Slurm that the tests are run on; `test_failures` does to it all that can be done."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.slurm import slurm_cluster
from tests.helpers.waiting import wait_until


@pytest.mark.quick
@pytest.mark.skipif(not slurm_cluster.is_installed(), reason="the slow tests install Slurm")
def test_a_job_runs_on_nodes_of_their_own(cluster, tmp_path):
    job = cluster.sbatch(
        "#!/bin/bash\nsrun hostname", "--nodes=3", f"--output={tmp_path}/%j", "--gpus-per-node=2"
    )
    assert cluster.wait(job, timeout=30) == "COMPLETED"
    assert sorted(cluster.output(job).split()) == cluster.nodes
    assert cluster.details(job)["ExitCode"] == "0:0"


def test_it_ends_with_the_process_that_started_it(slurm_possible):
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
        attached = subprocess.run(devices, check=True, capture_output=True, text=True).stdout
        assert str(directory) not in attached
    finally:
        environment = {**os.environ, "MINISLURM_DIR": str(directory)}
        subprocess.run([slurm_cluster.MINISLURM, "down"], env=environment, check=True)
        shutil.rmtree(directory)
