"""A run on the real Slurm, and what is done to it from outside."""

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.slurm.slurm_cluster import ENDED, PATIENCE, Cluster
from tests.helpers.runs import last_step, run_lines
from tests.helpers.waiting import wait_until

FAULTY = Path(__file__).with_name("faulty")
STEPS = 24
PYTHON = Path(sys.executable)
EXPERTS = ("model.experts.count=4", "model.experts.dim=16", "model.experts.top_k=2")
# Two ranks, each on its own node, as each strategy needs them to be told.
STRATEGIES = {
    "ddp": ("strategy=ddp",),
    "fsdp": ("strategy=fsdp",),
    "hsdp": ("strategy=hsdp", "strategy.shard_size=2"),
    "fsdp_cp": ("strategy=fsdp_cp", "strategy.context_parallel=2"),
    "fsdp_tp": ("strategy=fsdp_tp", "strategy.tensor_parallel=2"),
    "fsdp_ep": ("strategy=fsdp_ep", "strategy.expert_parallel=2", *EXPERTS),
    "deepspeed_1": ("strategy=deepspeed_1",),
    "deepspeed_2": ("strategy=deepspeed_2",),
    "deepspeed_3": ("strategy=deepspeed_3",),
}


def overrides(prepared: Path, runs: Path, name: str, strategy: str) -> list[str]:
    """A run of 24 small steps on two ranks, with a checkpoint every four."""
    return run_lines(
        *(prepared, runs, name, f"budget.steps={STEPS}", "batch.tokens=256", "checkpoint.every=4"),
        *("checkpoint.keep_last=3", "eval.every=8", "eval.sequences=4"),
        *("strategy.num_threads=1", "strategy.timeout=30", *STRATEGIES[strategy]),
    )


@dataclass
class Disturbed:
    """A job and its run, or an array and those of its tasks.

    job, run: its number and the run's directory, of an array the one that its runs are in. tasks:
    names of an array's runs. marks: where the faults inside it leave theirs.
    """

    cluster: Cluster
    job: str
    run: Path
    marks: Path
    tasks: tuple[str, ...] = ()

    @property
    def jobs(self) -> list[str]:
        """The numbers by which Slurm knows it."""
        return [f"{self.job}_{index}" for index in range(len(self.tasks))] or [self.job]

    @property
    def runs(self) -> list[Path]:
        """The directories of its runs."""
        return [self.run / name for name in self.tasks] or [self.run]

    # ---- what it does

    def until(self, what: str, is_so: Callable[[], Any], timeout: float = PATIENCE) -> Any:
        """Wait until something is so; return it.

        Raises:
            AssertionError: it is not in time.
        """
        return wait_until(is_so, timeout, lambda: f"not {what} in {timeout} s: {self.output()}")

    def wait_at_fault(self, name: str, rank: int = 1) -> tuple[str, int]:
        """Wait until a rank has come to a fault; return its node and its process there."""
        ends = [f".{index}" for index in range(len(self.tasks))] or [""]
        marks = [self.marks / f"{name}-{rank}{end}" for end in ends]
        self.until(f"at {name}", lambda: all(mark.exists() for mark in marks))
        node, pid = marks[0].read_text().split()
        return node, int(pid)

    def release(self, name: str) -> None:
        """Let the ranks continue that wait there."""
        (self.marks / f"{name}.go").touch()

    def reached(self, step: int) -> None:
        """Wait for a step."""
        self.until(f"at step {step}", lambda: last_step(self.run) >= step)

    def output(self) -> str:
        """Everything that the job has printed."""
        # Not by asking Slurm, whose controller may be away.
        logs = sorted((self.run / "logs").glob("slurm-*.out"))
        return "".join(path.read_text(errors="replace") for path in logs)

    def wait_for_output(self, pattern: str, times: int = 1) -> None:
        """Wait until its output has this so often."""
        self.until(f"printing {pattern}", lambda: len(re.findall(pattern, self.output())) >= times)

    def failures(self) -> list[list[str]]:
        """The lines of the run's failures.tsv: time, job, newest step, cause, bad node."""
        notes = [run / "failures.tsv" for run in self.runs]
        lines = [line for n in notes if n.exists() for line in n.read_text().splitlines()]
        return [line.split("\t") for line in lines]

    def ended(self, timeout: float = PATIENCE) -> list[str]:
        """Wait for the end of all and return their states."""
        return [self.cluster.wait(job, *ENDED, timeout=timeout) for job in self.jobs]

    def restarts(self) -> list[int]:
        """How often Slurm has started each again."""
        return [int(self.cluster.details(job).get("Restarts", 0)) for job in self.jobs]

    # ---- what is done to it

    def preempt(self) -> None:
        """Let a job of the partition `high` take all nodes for a second."""
        options = ("--partition=high", "--exclusive", f"--nodes={len(self.cluster.nodes)}")
        self.cluster.sbatch("#!/bin/bash\nsleep 1", *options, "--output=/dev/null")

    def kill_rank(self, node: str, pid: int, signal: str = "KILL") -> None:
        """Send a signal to one process of a node."""
        done = self.cluster.on(node, "kill", f"-{signal}", str(pid))
        assert not done.returncode, done.stderr


def start(
    cluster: Cluster,
    lines: Sequence[str],
    folder: Path,
    run: Path,
    faults: Sequence[dict[str, Any]] = (),
    job: Sequence[str] = (),
    tasks: tuple[str, ...] = (),
) -> Disturbed:
    """Submit a run by `modtrain submit`, with faults inside it.

    folder: where it is submitted, and the faults' marks lie. job: of the job, later ones win.
    tasks: names of runs that an array does, all the same.
    """
    marks = folder / "marks"
    marks.mkdir(parents=True, exist_ok=True)
    (marks / "faults.json").write_text(json.dumps(list(faults)))
    environment = {
        "PYTHONPATH": os.pathsep.join([str(FAULTY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "MODTRAIN_TEST_FAULTS": str(marks / "faults.json"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    asked = [
        "cluster=cpu",
        "nodes=2",
        "time=00:20:00",
        "cluster.lead=60",
        "cluster.retry_delay=1",
        *job,
    ]
    if tasks:
        tasks_own = ", ".join(f'{name}: ["log.every=1"]' for name in tasks)
        asked.append(f"++array={{{tasks_own}}}")
    command = [str(PYTHON), "-m", "modtrain", "submit", "train", *lines, *asked]
    # Not what this process was started by.
    output = cluster.run(
        "env",
        *(f"--unset={name}" for name in os.environ if name.startswith("PYTEST_")),
        *command,
        env=environment,
        cwd=folder,
        timeout=300,
    ).stdout
    number = re.findall(r"submitted job (\d+)", output)[-1]
    return Disturbed(cluster, number, run, marks, tasks)
