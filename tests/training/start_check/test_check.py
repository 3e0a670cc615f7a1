"""The check of all nodes before the first step names those that cannot run what the others can."""

import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from modtrain.cli.compose import compose
from modtrain.common.errors import NodeError, StartCheckError
from modtrain.distributed.launch import Launch
from modtrain.training import job_scratch
from modtrain.training.start_check import check, node
from modtrain.training.start_check.check import Report, check_nodes, judge
from tests.helpers.ranks import on_ranks


class Nodes:
    """Ranks as threads of this process, two a node, each with what its node has."""

    def __init__(self, tmp_path: Path, monkeypatch) -> None:
        self.config = compose(
            "train",
            [
                "name=x",
                f"runs_dir={tmp_path}",
                "model=tiny",
                "budget.steps=1",
                f"data.path={tmp_path}",
            ],
        )
        self.clocks: dict[str, float] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.blind: set[str] = set()
        self.devices: dict[str, int] = {}
        self.names = ["alpha", "beta", "gamma"]
        now, run_problems = time.time, node.run_problems
        monkeypatch.setattr(check, "node_name", self.name)
        monkeypatch.setattr(check, "time", self)
        self.time = lambda: now() + self.clocks.get(self.name(), 0)
        monkeypatch.setattr(
            node, "versions", lambda: self.versions.get(self.name(), {"torch": "2"})
        )
        monkeypatch.setattr(node, "_VISIBLE_SECONDS", 0.0)
        monkeypatch.setattr(
            node,
            "run_problems",
            lambda run, token: run_problems(run, token + self.name() * (self.name() in self.blind)),
        )
        monkeypatch.setattr(torch.cuda, "device_count", lambda: self.devices.get(self.name(), 2))
        monkeypatch.setattr(torch, "ones", lambda *_, device: torch.full((256, 256), 1.0))

    def name(self) -> str:
        return self.names[int(threading.current_thread().name) // 2]

    def outcomes(self) -> list[str]:
        """What each rank raised."""
        store = HashStore()
        store.set_timeout(timedelta(seconds=20))
        outcomes = [""] * 6

        def run(rank: int) -> None:
            try:
                check_nodes(self.config, Launch(6, rank, rank % 2, 2), "cuda", store)
            except StartCheckError as error:
                outcomes[rank] = f"{','.join(error.nodes)}: {error}"

        threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    return Nodes(tmp_path, monkeypatch)


def test_sound_nodes_pass_and_nothing_is_left(nodes, tmp_path):
    nodes.clocks = {"beta": 50.0}
    assert nodes.outcomes() == [""] * 6
    assert list((tmp_path / "x/logs").iterdir()) == []


def test_every_rank_names_all_nodes_that_fail(nodes):
    nodes.clocks = {"beta": -1e6, "gamma": 90.0}
    nodes.versions = {"gamma": {"torch": "1"}}
    nodes.devices = {"gamma": 1}
    outcomes = nodes.outcomes()
    assert len(set(outcomes)) == 1
    for part in (
        "gamma,beta: ",
        "  beta: its clock is 1000000 s behind of alpha's\n",
        "  gamma: 1 CUDA devices for 2 processes; torch 1, which is 2 on alpha; its clock is 90 s",
    ):
        assert part in outcomes[0]


def test_a_node_that_does_not_see_the_run_is_named(nodes):
    nodes.blind = {"gamma"}
    assert all("gamma: " in text and "is to be shared" in text for text in nodes.outcomes())


def test_a_complete_run_is_not_written_to(nodes, tmp_path):
    (tmp_path / "x").mkdir()
    for name in ("COMPLETED", "result.json"):
        (tmp_path / "x" / name).touch()
    nodes.devices = {"gamma": 0}
    assert nodes.outcomes() == [""] * 6
    assert not (tmp_path / "x/logs").exists()


def test_what_fails_everywhere_is_no_nodes_fault():
    reports = [Report(name, True, {"run": ["is full"], "data": []}) for name in "ab"]
    assert judge(reports, {}, 30) == {}
    reports[1].problems = {}
    assert judge(reports, {}, 30) == {"a": ["is full"]}


def test_versions_are_compared_with_those_of_most_nodes():
    reports = [Report(n, True, versions={"torch": v}) for n, v in zip("abc", "122", strict=True)]
    assert judge(reports, {}, 30) == {"a": ["torch 1, which is 2 on b"]}
    assert judge(reports[:2], {}, 30) == {"b": ["torch 2, which is 1 on a"]}


def test_a_device_that_computes_wrong_numbers_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.full((256, 256), 1.5))
    assert list(node.device_problems("cuda", 0, 1)) == ["cuda:0 computes wrong numbers"]

    def broken(*_, device):
        raise RuntimeError("CUDA error: uncorrectable ECC error\nmore")

    monkeypatch.setattr(torch, "ones", broken)
    (line,) = node.device_problems("cuda", 0, 1)
    assert line == "cuda:0 does not work: CUDA error: uncorrectable ECC error"


def test_each_node_has_a_directory_of_the_job(tmp_path, monkeypatch):
    path = tmp_path / "modtrain-7_3"
    environment = {job_scratch.SCRATCH: str(path), "TMPDIR": str(tmp_path)}
    monkeypatch.setattr(tempfile, "tempdir", None)
    job_scratch.use_job_scratch(environment)
    assert environment == {"TMPDIR": str(path)}
    assert list(path.iterdir()) == []
    with pytest.raises(NodeError, match=r"cannot be used on .*: No such file"):
        job_scratch.use_job_scratch({job_scratch.SCRATCH: str(tmp_path / "a/b")})


def summed(megabytes: int) -> str:
    from modtrain.distributed.process_group import Ranks

    return check.check_all_reduce(megabytes, torch.device("cpu"), Ranks.create())


@pytest.mark.slow
def test_the_ranks_sum_by_choice():
    assert all("all-reduce of 1 MiB: " in text for text in on_ranks(summed, 2, 1))
