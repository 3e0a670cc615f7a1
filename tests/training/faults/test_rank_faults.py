"""What goes wrong on one rank: all ranks end, and say which one it was, where and why."""

import os
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from modtrain.checkpoint import checkpointer
from modtrain.checkpoint.layout import Manifest
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.distributed.watchdog import Watchdog
from modtrain.training import rank_consistency
from modtrain.training.module import LanguageModule
from tests.helpers.ranks import RankFailedError, outcomes_on_ranks
from tests.helpers.runs import before_step, losses_of, run, run_lines

STRATEGIES = ["ddp", "fsdp"]
# Seconds that a rank waits for another: all that the tests of a rank that is silent take.
TIMEOUT = 4


def overrides(prepared: Path, runs: Path, *more: str) -> list[str]:
    return run_lines(
        *(prepared, runs, "run", "budget.steps=8", "batch.tokens=256", "eval.every=null"),
        *("eval.sequences=4", f"strategy.timeout={TIMEOUT}", *more),
    )


def raises() -> None:
    raise ValueError("the disk spoke Latin")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs() -> None:
    time.sleep(600)


def runs_out_of_memory() -> None:
    # A limit just above what there is, so that the next large tensor is one too many.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
    torch.zeros(2**34)


def faulty(lines: list[str], fault, step: int, rank: int) -> str:
    """Train, with a fault on one rank at the beginning of a step."""
    before_step(step, fault, rank=rank)
    return run(lines)


def ended(outcomes: list, rank: int) -> RankFailedError:
    outcome = outcomes[rank]
    assert isinstance(outcome, RankFailedError), outcome
    return outcome


def assert_names_rank(outcome: RankFailedError, rank: int) -> None:
    """The message of another rank names the one that raised."""
    assert outcome.kind == "RankError"
    assert outcome.message.startswith(f"rank {rank} on ")
    assert outcome.message.endswith("failed: ValueError: the disk spoke Latin")


@pytest.mark.slow
@pytest.mark.on_commit(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_is_named_with_its_reason(prepared, tmp_path, strategy, rank):
    lines = overrides(prepared, tmp_path, f"strategy={strategy}")
    outcomes = outcomes_on_ranks(faulty, 2, lines, raises, 3, rank, joins=False, timeout=60)
    own, other = ended(outcomes, rank), ended(outcomes, 1 - rank)
    assert (own.kind, own.message) == ("ValueError", "the disk spoke Latin")
    assert_names_rank(other, rank)


def raises_while_the_other_is_late(lines: list[str]) -> str:
    """Rank 0 fails; rank 1 comes to the collective so late that it waits past its heartbeat's."""
    return faulty(lines, raises if os.environ["RANK"] == "0" else late, 3, int(os.environ["RANK"]))


def late() -> None:
    time.sleep(TIMEOUT / 2)


@pytest.mark.slow
@pytest.mark.on_commit(1)
def test_a_rank_that_waits_for_a_failed_one_is_not_stuck(prepared, tmp_path):
    lines = overrides(prepared, tmp_path, "strategy=ddp")
    outcomes = outcomes_on_ranks(raises_while_the_other_is_late, 2, lines, joins=False, timeout=60)
    assert_names_rank(ended(outcomes, 1), 0)


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_that_dies_is_named(prepared, tmp_path, strategy):
    lines = overrides(prepared, tmp_path, f"strategy={strategy}")
    outcomes = outcomes_on_ranks(faulty, 2, lines, dies, 3, 1, joins=False, timeout=60)
    assert "exit code -9" in ended(outcomes, 1).message
    other = ended(outcomes, 0)
    assert other.kind == "RankError"
    assert "rank 1 on " in other.message and "has died" in other.message


@pytest.mark.slow
def test_a_dead_first_rank_ends_the_others(prepared, tmp_path):
    lines = overrides(prepared, tmp_path, "strategy=ddp", "batch.tokens=384")
    outcomes = outcomes_on_ranks(faulty, 3, lines, dies, 3, 0, joins=False, timeout=60)
    for rank in (1, 2):
        other = ended(outcomes, rank)
        assert other.kind == "RankError"
        assert "rank 0" in other.message


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named_and_shows_where(prepared, tmp_path, rank):
    lines = overrides(prepared, tmp_path, "strategy=ddp")
    started = time.monotonic()
    outcomes = outcomes_on_ranks(faulty, 2, lines, hangs, 3, rank, joins=False, timeout=90)
    assert time.monotonic() - started < 60
    other = ended(outcomes, 1 - rank)
    assert other.kind == "RankError"
    assert f"rank {rank} on " in other.message
    assert "step 4" in other.message
    assert "exit code 1" in ended(outcomes, rank).message
    stacks = (tmp_path / f"run/logs/stacks-rank-{rank:05d}.txt").read_text()
    assert "in hangs" in stacks


def slow(lines: list[str], what: str) -> str:
    """Train where the disk takes longer than a rank waits for another."""
    owner, name = {"save": (checkpointer, "write"), "restore": (Manifest, "check")}[what]
    original = getattr(owner, name)

    def late(*arguments, **named):
        if named.get("contents", True):
            time.sleep(1.5 * TIMEOUT)
        return original(*arguments, **named)

    setattr(owner, name, late)
    return run(lines)


def slow_evaluation(lines: list[str]) -> str:
    original = TokenDataModule.val_dataloader

    def val_dataloader(data):
        for batch in original(data):
            time.sleep(TIMEOUT / 3)
            yield batch

    TokenDataModule.val_dataloader = val_dataloader
    return run(lines)


@pytest.mark.slow
def test_a_long_evaluation_is_not_stuck(prepared, tmp_path):
    more = ["strategy=ddp", "budget.steps=1", "eval.sequences=12", "eval.batch_size=1"]
    lines = overrides(prepared, tmp_path, *more)
    assert outcomes_on_ranks(slow_evaluation, 2, lines, joins=False) == ["complete"] * 2
    assert not list(tmp_path.glob("run/logs/stacks-*"))


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize("what", ["save", "restore"])
def test_a_slow_disk_is_not_stuck(prepared, tmp_path, what):
    lines = overrides(prepared, tmp_path, "strategy=ddp", "checkpoint.every=4")
    if what == "save":
        # The last one alone, which is waited for.
        lines.append("budget.steps=3")
    else:
        outcomes_on_ranks(not_a_number, 2, lines, 1, joins=False, timeout=60)
    assert outcomes_on_ranks(slow, 2, lines, what, joins=False) == ["complete"] * 2
    assert not list(tmp_path.glob("run/logs/stacks-*"))


def test_what_has_its_time_is_not_stuck(tmp_path):
    watchdog = Watchdog(dist.HashStore(), 0, 2, 0.3, tmp_path)
    stacks = tmp_path / "stacks-rank-00000.txt"
    try:
        watchdog.heartbeat("a save", timeout=60)
        time.sleep(1)
        assert not stacks.exists()
        # The next heartbeat has the usual timeout again, as has a rank that another waits for.
        watchdog.heartbeat("step 1")
        time.sleep(1)
        assert stacks.read_text().count("has made no progress since step 1") == 1
    finally:
        watchdog.close()


def test_a_patient_rank_ends_where_others_wait(tmp_path):
    (own,) = outcomes_on_ranks(awaited, 1, str(tmp_path), joins=False, timeout=60)
    assert "exit code 1" in ended([own], 0).message
    stacks = (tmp_path / "stacks-rank-00001.txt").read_text()
    assert "in awaited" in stacks


def awaited(logs: str) -> None:
    store = dist.HashStore()
    watchdog = Watchdog(store, 1, 2, 0.3, Path(logs))
    watchdog.heartbeat("a save", timeout=60)
    store.add("num_failures", 1)
    time.sleep(30)


@pytest.mark.slow
def test_out_of_memory_names_what_to_change(prepared, tmp_path):
    lines = overrides(prepared, tmp_path, "strategy=ddp")
    outcomes = outcomes_on_ranks(
        faulty, 2, lines, runs_out_of_memory, 3, 1, joins=False, timeout=60
    )
    own, other = ended(outcomes, 1), ended(outcomes, 0)
    assert own.kind == "TrainingError"
    assert "batch.micro_batch_size" in own.message
    assert other.message.startswith("rank 1 on ") and "out of memory" in other.message


def not_a_number(lines: list[str], rank: int) -> str:
    original = LanguageModule.training_step

    def training_step(module, batch, batch_idx):
        loss = original(module, batch, batch_idx)
        if module.global_step == 4 and dist.get_rank() == rank:
            module.statistics.loss = module.statistics.loss + float("nan")
            return loss * float("nan")
        return loss

    LanguageModule.training_step = training_step
    return run(lines)


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_nan_on_one_rank_stops_all_before_it_is_saved(prepared, tmp_path, strategy):
    lines = overrides(prepared, tmp_path, f"strategy={strategy}", "log.every=100")
    outcomes = outcomes_on_ranks(not_a_number, 2, lines, 1, joins=False, timeout=60)
    for rank in (0, 1):
        outcome = ended(outcomes, rank)
        assert outcome.kind == "DivergedError"
        assert "at step 5 on rank 1;" in outcome.message
        assert outcome.message.count("step-000000004") == 1


def differing(lines: list[list[str]]) -> str:
    return run(lines[int(os.environ["RANK"])])


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("optimizer.lr=0.002", "optimizer.lr: 0.001 on rank 0, 0.002 here"),
        ("budget.steps=9", "budget.steps: 8 on rank 0, 9 here"),
        ("strategy=fsdp", "strategy.name: ddp on rank 0, fsdp here"),
        ("name=other", "name: run on rank 0, other here"),
    ],
)
def test_ranks_of_different_configurations_stop_at_once(prepared, tmp_path, more, key):
    first = overrides(prepared, tmp_path, "strategy=ddp")
    outcomes = outcomes_on_ranks(differing, 2, [first, [*first, more]], joins=False, timeout=60)
    for rank in (0, 1):
        outcome = ended(outcomes, rank)
        assert outcome.kind == "RankError"
        assert key in outcome.message
    assert not (tmp_path / "run/config.yaml").exists()


def of_another_version(lines: list[str]) -> str:
    commit = "f00" if os.environ["RANK"] == "1" else "ba4"
    rank_consistency.code_version = lambda: {"commit": commit, "diff": ""}
    return run(lines)


def test_ranks_of_different_code_stop(prepared, tmp_path):
    lines = overrides(prepared, tmp_path, "strategy=ddp")
    for outcome in outcomes_on_ranks(of_another_version, 2, lines, joins=False, timeout=60):
        assert "code.commit: ba4 on rank 0, f00 here" in outcome.message


def of_other_data(lines: list[str], other: str) -> str:
    if os.environ["RANK"] == "1":
        os.chdir(other)
    return run(lines)


def test_ranks_that_read_different_data_stop(prepared, tmp_path):
    """The same relative path leads elsewhere on another node."""
    for name in ("one", "two"):
        shutil.copytree(prepared, tmp_path / name / "shards")
    index = tmp_path / "two/shards/index.json"
    index.write_text(index.read_text().replace('"fingerprint":"', '"fingerprint":"0'))
    lines = overrides(prepared, tmp_path, "strategy=ddp", "data.path=shards")
    os.chdir(tmp_path / "one")
    outcomes = outcomes_on_ranks(of_other_data, 2, lines, str(tmp_path / "two"), joins=False)
    for outcome in outcomes:
        assert isinstance(outcome, RankFailedError)
        assert "fingerprint" in outcome.message


def with_other_clock_and_host(lines: list[str]) -> str:
    """Another clock and another host name on rank 1."""
    if os.environ["RANK"] == "1":
        original = time.time
        time.time = lambda: original() - 1e6
        socket.gethostname = lambda: "elsewhere"
    return run(lines)


@pytest.mark.nightly
def test_clocks_and_hosts_that_differ_change_nothing(prepared, tmp_path):
    lines = overrides(prepared, tmp_path, "strategy=ddp")
    assert outcomes_on_ranks(with_other_clock_and_host, 2, lines, joins=False) == ["complete"] * 2
    lines = overrides(prepared, tmp_path / "again", "strategy=ddp")
    assert outcomes_on_ranks(run, 2, lines, joins=False) == ["complete"] * 2
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "again/run")
