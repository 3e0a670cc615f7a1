"""Checks all nodes of a run before its first step, and names those that fail.

It needs no process group, which a node that is not well may be unable to join: the processes
report through the store by which they have found each other. Rank 0 decides, and all raise the
same error.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from modtrain.common.errors import StartCheckError
from modtrain.distributed.launch import Launch, node_name
from modtrain.distributed.process_group import Ranks
from modtrain.training.config import TrainConfig
from modtrain.training.run_directory import RunDirectory
from modtrain.training.start_check import node

# Problems that are not of a node where all have them: what needs the directory reports them.
_SHARED = ("run", "data", "scratch")
_KEY = "start check"
# The directory that stands in for that of a run without a name, while the nodes are checked.
_UNNAMED = ".start_check"


@dataclass
class Report:
    """What one process reports.

    problems: by kind. versions: empty but for the first process of a node.
    """

    node: str
    is_first: bool
    problems: dict[str, list[str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def check_nodes(config: TrainConfig, launch: Launch, device_type: str, store: Store) -> None:
    """Check devices, shared paths, temporary files, versions and clocks of all nodes; collective.

    A run that is complete is not checked: nothing is written to it.

    Raises:
        StartCheckError: on all ranks, with the nodes that failed, and why.
    """
    with _shared_mark(config, launch, store) as (run, token):
        if not token:
            return
        report = _report(config, launch, device_type, run, token)
        store.set(f"{_KEY}/report/{launch.rank}", json.dumps(asdict(report)))
        if launch.rank == 0:
            reports = [
                Report(**json.loads(store.get(f"{_KEY}/report/{rank}")))
                for rank in range(launch.world_size)
            ]
            skews = _clock_skews(reports, store)
            failures = judge(reports, skews, config.start_check.max_clock_skew)
            store.set(f"{_KEY}/failures", json.dumps(failures))
        elif report.is_first:
            store.wait([f"{_KEY}/clock of rank 0/{launch.rank}"])
            store.set(f"{_KEY}/clock/{launch.rank}", repr(time.time()))
        failures = json.loads(store.get(f"{_KEY}/failures"))
    if failures:
        raise StartCheckError(_message(failures), tuple(failures))


@contextmanager
def _shared_mark(
    config: TrainConfig, launch: Launch, store: Store
) -> Iterator[tuple[RunDirectory, str]]:
    """Let rank 0 write a file that all nodes are to see.

    Yields its directory, and its token, which is empty for a complete run.
    """
    key = f"{_KEY}/token"
    if launch.rank:
        token = store.get(key).decode()
        yield _directory(config, token), token
        return
    token = secrets.token_hex(8)
    run = _directory(config, token)
    token = "" if run.is_complete else token
    mark = run.logs / f"{node.MARK}{token}"
    if token:
        # What is wrong with the directory is found by writing to it below.
        with suppress(OSError):
            run.logs.mkdir(parents=True, exist_ok=True)
            mark.touch()
    store.set(key, token)
    try:
        yield run, token
    finally:
        if token:
            with suppress(OSError):
                mark.unlink()
        if config.name is None:
            shutil.rmtree(run.path, ignore_errors=True)


def _directory(config: TrainConfig, token: str) -> RunDirectory:
    return RunDirectory(Path(config.runs_dir) / (config.name or f"{_UNNAMED}-{token}"))


def _report(
    config: TrainConfig, launch: Launch, device_type: str, run: RunDirectory, token: str
) -> Report:
    report = Report(node_name(), launch.local_rank == 0)
    processes = launch.local_world_size
    checks = {
        "devices": node.device_problems(device_type, launch.local_rank, processes),
        "scratch": node.scratch_problems(),
    }
    if report.is_first:
        checks["run"] = node.run_problems(run, token)
        checks["data"] = node.data_problems(config)
        report.versions = node.versions()
    report.problems = {kind: lines for kind, check in checks.items() if (lines := list(check))}
    return report


def _clock_skews(reports: Sequence[Report], store: Store) -> dict[str, float]:
    """Return how many seconds each node's clock is off, at least; 0 where that cannot be told.

    A node reads its clock between two readings here, however long it takes.
    """
    skews = {}
    for rank, report in enumerate(reports):
        if rank and report.is_first:
            before = time.time()
            store.set(f"{_KEY}/clock of rank 0/{rank}", "")
            clock = float(store.get(f"{_KEY}/clock/{rank}"))
            after = time.time()
            skews[report.node] = clock - before if clock < before else max(0.0, clock - after)
    return skews


def judge(
    reports: Sequence[Report], skews: Mapping[str, float], max_clock_skew: float
) -> dict[str, list[str]]:
    """Return what is wrong with each node that fails.

    skews: seconds by node.
    """
    failures: dict[str, list[str]] = {}
    nodes = {report.node for report in reports if report.is_first}
    for kind in ("devices", *_SHARED):
        lines = [(r.node, line) for r in reports for line in r.problems.get(kind, [])]
        if kind in _SHARED and {name for name, _ in lines} == nodes:
            continue
        for name, line in lines:
            failures.setdefault(name, []).append(line)
    for name, line in _differing_versions([report for report in reports if report.is_first]):
        failures.setdefault(name, []).append(line)
    for name, skew in skews.items():
        if abs(skew) > max_clock_skew:
            way = "behind" if skew < 0 else "ahead"
            line = f"its clock is {abs(skew):.0f} s {way} of {reports[0].node}'s"
            failures.setdefault(name, []).append(line)
    return {name: list(dict.fromkeys(lines)) for name, lines in failures.items()}


def _differing_versions(reports: Sequence[Report]) -> Iterator[tuple[str, str]]:
    """Find nodes whose versions are not those of most nodes, of equally many those of rank 0's."""
    for package in dict.fromkeys(name for report in reports for name in report.versions):
        usual = Counter(r.versions.get(package, "none") for r in reports).most_common(1)[0][0]
        elsewhere = next(r.node for r in reports if r.versions.get(package, "none") == usual)
        for report in reports:
            version = report.versions.get(package, "none")
            if version != usual:
                yield report.node, f"{package} {version}, which is {usual} on {elsewhere}"


def _message(failures: Mapping[str, Sequence[str]]) -> str:
    lines = "".join(f"  {name}: {'; '.join(reasons)}\n" for name, reasons in failures.items())
    return (
        f"the check before the first step failed on {', '.join(failures)}:\n{lines}"
        "remedy: repair or leave out what is named; start_check.enabled=false starts without"
    )


def check_all_reduce(megabytes: int, device: torch.device, ranks: Ranks) -> str:
    """Sum a tensor of so many MiB over all ranks, twice; return a line with the bandwidth.

    device: of the tensor. The second sum is timed.

    Raises:
        StartCheckError: the sum is wrong; names the nodes of the ranks that have it.
    """
    values = torch.ones(megabytes * 2**18, device=device)
    dist.all_reduce(values)
    values.fill_(ranks.rank + 1)
    expected = ranks.world_size * (ranks.world_size + 1) / 2
    ranks.any(False)
    began = time.perf_counter()
    dist.all_reduce(values)
    is_right = bool((values == expected).all())
    seconds = time.perf_counter() - began
    results = ranks.all_gather_object((node_name(), is_right))
    if wrong := dict.fromkeys(name for name, is_right in results if not is_right):
        failures = {name: ["the all-reduce gave a wrong sum"] for name in wrong}
        raise StartCheckError(_message(failures), tuple(failures))
    # What each rank sends and receives in a ring.
    moved = 2 * (ranks.world_size - 1) / ranks.world_size * megabytes * 2**20
    rate = moved / seconds / 1e9
    return f"all-reduce of {megabytes} MiB: {seconds:.3g} s, {rate:.3g} GB/s a rank"
