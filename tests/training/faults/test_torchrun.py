"""End to end, as users start it: torchrun, two nodes, the command line itself."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.ranks import free_port
from tests.helpers.runs import last_step
from tests.helpers.saved import assert_same_bits, newest_tensors
from tests.training.faults.run_cases import overrides

STEPS = 8


def start(nodes: int, per_node: int, lines: list[str], cwd: Path) -> list[subprocess.Popen]:
    """Start one torchrun a node; they meet at a port of this machine."""
    endpoint = f"127.0.0.1:{free_port()}"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes)),
        *("--nproc-per-node", str(per_node), "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", endpoint, "-m", "modtrain", "train", *lines),
    ]
    return [
        subprocess.Popen(
            command,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )
        for _ in range(nodes)
    ]


def finish(nodes: list[subprocess.Popen]) -> tuple[list[int], str]:
    output = "".join(node.communicate(timeout=240)[0] for node in nodes)
    return [node.returncode for node in nodes], output


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_nodes_of_two_are_stopped_by_one_and_resume(prepared, tmp_path):
    more = ("strategy=hsdp", "strategy.shard_size=2")
    whole = overrides(prepared, tmp_path, "whole", STEPS, *more)
    codes, output = finish(start(2, 2, whole, tmp_path))
    assert codes == [0, 0], output
    assert output.count("is complete: 8 steps") == 1  # rank 0 speaks for all
    stopped = overrides(prepared, tmp_path, "cut", STEPS, *more)
    nodes = start(2, 2, stopped, tmp_path)
    while last_step(tmp_path / "cut") < 3:
        assert all(node.poll() is None for node in nodes)
        time.sleep(0.01)
    nodes[1].send_signal(signal.SIGTERM)
    codes, output = finish(nodes)
    assert all(codes), output
    assert not (tmp_path / "cut/COMPLETED").exists()
    codes, output = finish(start(2, 2, stopped, tmp_path))
    assert codes == [0, 0], output
    assert "resumes from step" in output
    assert_same_bits(*(newest_tensors(tmp_path / name, STEPS) for name in ("whole", "cut")))
    starts = json.loads((tmp_path / "cut/manifest.json").read_text())["starts"]
    assert len(starts) == 2


def start_alone(count: int, lines: list[str], cwd: Path) -> list[subprocess.Popen]:
    """Start ranks as srun does: by themselves, with the store in rank 0's process."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        for rank in range(count)
    ]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "modtrain", "train", *lines],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **address, **rank, "LOCAL_WORLD_SIZE": str(count)},
        )
        for rank in ranks
    ]


# Three ranks under each strategy whose groups a dead rank leaves in another way.
OF_THREE = {
    "ddp": ("strategy=ddp",),
    "fsdp": ("strategy=fsdp",),
    "fsdp_ep": (
        *("strategy=fsdp_ep", "strategy.expert_parallel=3", "model.experts.count=3"),
        *("model.experts.dim=16", "model.experts.top_k=2"),
    ),
    "deepspeed_2": ("strategy=deepspeed_2",),
}


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize("strategy", OF_THREE)
@pytest.mark.parametrize("killed", [0, 1, 2])
def test_the_lowest_rank_that_lives_names_the_one_that_died(prepared, tmp_path, strategy, killed):
    more = (*OF_THREE[strategy], "batch.tokens=384", "checkpoint.every=1000")
    ranks = start_alone(3, overrides(prepared, tmp_path, "cut", 10_000, *more), tmp_path)
    while last_step(tmp_path / "cut") < 3:
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.05)
    ranks[killed].kill()
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    # Its host is known a few seconds after the start.
    naming = [bool(re.search(rf"rank {killed} (on .*)?has died", text)) for text in outputs]
    assert naming == [rank == (1 if killed == 0 else 0) for rank in range(3)], outputs
    assert all(rank.returncode for rank in ranks)


@pytest.mark.nightly
@pytest.mark.parametrize("killed", [(0, 1), (1, 2), (0, 2)])
def test_the_lowest_rank_that_lives_speaks_when_two_have_died(prepared, tmp_path, killed):
    more = ("strategy=ddp", "batch.tokens=512", "checkpoint.every=1000")
    ranks = start_alone(4, overrides(prepared, tmp_path, "cut", 10_000, *more), tmp_path)
    while last_step(tmp_path / "cut") < 3:
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.05)
    # By then each rank has seen the others' heartbeats.
    time.sleep(6)
    for rank in killed:
        ranks[rank].kill()
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    naming = [bool(re.search(rf"rank {killed[0]} (on .*)?has died", text)) for text in outputs]
    lowest = min({0, 1, 2, 3} - {*killed})
    assert naming == [rank == lowest for rank in range(4)], outputs


@pytest.mark.nightly
def test_a_wrong_configuration_is_reported_once(prepared, tmp_path):
    lines = overrides(prepared, tmp_path, "wrong", STEPS, "strategy=single", "optimizer.lr=-1")
    (code,), output = finish(start(1, 2, lines, tmp_path))
    assert code
    assert output.count("optimizer.lr=-1") == 1
    assert "choose strategy=ddp" in output
