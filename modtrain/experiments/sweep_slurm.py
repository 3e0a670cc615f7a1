"""The jobs of a sweep on Slurm: submitted by submitit, told to stop, requeued and awaited by us.

submitit's own way would lose runs: it takes SIGTERM away, requeues by a count of its own and not
where its first signal is SIGTERM's, and asks ``sacct`` how jobs are, without which it waits for
ever for one that was killed. So its signal is the one that modtrain knows, the run saves and puts
itself back into the queue, and ``squeue`` is asked.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton

from modtrain.cluster import slurm
from modtrain.cluster.runs import CANCELLED
from modtrain.errors import ModtrainError, RankError
from modtrain.experiments.sweep_state import failure_path, state_of, write_failure
from modtrain.training.launch import Launch
from modtrain.training.preemption import STOP
from modtrain.training.run_directory import RunDirectory

# Those of hydra-submitit-launcher's settings that are the same on any cluster; the others are
# Slurm's.
_COMMON = frozenset(
    (
        *("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes"),
        *("name", "stderr_to_stdout"),
    )
)
# A signal while the interpreter starts would kill the task, and with it the job.
_DEAF_START = 'bash -c \'trap "" TERM USR1; exec "$0" "$@"\''
_BETWEEN_LOOKS = 2.0
# squeue may not know a job yet, or not see it for a moment while it is requeued.
_LOOKS_UNTIL_GONE = 3
_TAKEN_AWAY = 60.0
_BROKEN = frozenset(("FAILED", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"))

Say = Callable[[str], None]


def is_on_slurm() -> bool:
    """Whether this process is a task that submitit has started on Slurm."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and "SLURM_JOB_ID" in os.environ


def launch_on_slurm(
    launcher: Any, jobs: Sequence[Sequence[str]], runs: Sequence[RunDirectory], say: Say
) -> None:
    """Submit what is not in the queue already, and wait until nothing is left of it there.

    launcher: hydra-submitit-launcher's. jobs: the overrides of each. A stop signal ends the
    waiting, not the jobs.

    Raises:
        SlurmError: Slurm cannot be asked.
    """
    known = {run.path: job for run in runs if (job := _last_job(run))}
    there = slurm.jobs(set(known.values()))
    queued = {p: j for p, j in known.items() if j in there and not there[j].is_over}
    new = [n for n, run in enumerate(runs) if run.path not in queued]
    if new:
        submitted = _submit(launcher, [jobs[n] for n in new])
        for number, job in zip(new, submitted, strict=True):
            _note_job(runs[number], job)
            queued[runs[number].path] = job
    for run in runs:
        say(f"{run.path.name}: job {queued[run.path]}")
    _wait({RunDirectory(path): job for path, job in queued.items()}, say)


def _submit(launcher: Any, jobs: Sequence[Sequence[str]]) -> list[str]:
    # Read by submitit when it is imported, here and in the jobs.
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"
    import submitit  # noqa: PLC0415

    own = dict(launcher.params)
    executor = submitit.AutoExecutor(
        folder=own.pop("submitit_folder"),
        cluster="slurm",
        slurm_max_num_timeout=own.pop("max_num_timeout"),
        slurm_python=f"{_DEAF_START} {sys.executable}",
    )
    setup = [
        'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
        "export MASTER_PORT=$((12000 + SLURM_JOB_ID % 20000))",
        f"export MODTRAIN_LEAD={own['signal_delay_s']}",
        # What srun does not take from sbatch by itself.
        'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"',
        *(own.pop("setup") or []),
    ]
    executor.update_parameters(
        **{k if k in _COMMON else f"slurm_{k}": v for k, v in own.items() if v is not None},
        slurm_setup=setup,
        slurm_srun_args=["--kill-on-bad-exit=1"],
    )
    state = Singleton.get_state()
    calls = [(list(job), "hydra.sweep.dir", n, str(n), state) for n, job in enumerate(jobs)]
    return [str(job.job_id) for job in executor.map_array(launcher, *zip(*calls, strict=True))]


def _wait(jobs: dict[RunDirectory, str], say: Say) -> None:
    missed = dict.fromkeys(jobs, 0)
    left = dict(jobs)
    while left and not STOP.requested:
        found = slurm.jobs(set(left.values()))
        for run, job in list(left.items()):
            there = found.get(job)
            missed[run] = missed[run] + 1 if there is None or there.is_over else 0
            if missed[run] < _LOOKS_UNTIL_GONE:
                continue
            del left[run]
            if there is not None and there.state in _BROKEN and state_of(run) == "stopped":
                write_failure(run, "Slurm", f"job {job} ended as {there.state}")
            say(f"{run.path.name}: {state_of(run)}")
        time.sleep(_BETWEEN_LOOKS if left else 0)
    if left:
        say(f"the jobs go on: {' '.join(left.values())}; the same command waits for them again")


def train_on_slurm(run: RunDirectory, work: Callable[[], int]) -> int:
    """Call ``work`` in this task of a job; where it was stopped, requeue the job, and end."""
    STOP.install()
    is_first = Launch.from_environment().rank == 0
    if is_first:
        failure_path(run).unlink(missing_ok=True)
    try:
        code = work()
    except Exception as error:
        traceback.print_exc()
        if is_first or not isinstance(error, RankError):
            write_failure(run, type(error).__name__, str(error) or repr(error))
        sys.exit(error.exit_code if isinstance(error, ModtrainError) else 1)
    if code == 0:
        return 0
    if is_first:
        _requeue(run)
    # The job is taken away from under this process.
    time.sleep(_TAKEN_AWAY)
    sys.exit(code)


def _requeue(run: RunDirectory) -> None:
    """Put this job back into the queue, unless it was cancelled."""
    environment = os.environ
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    cancelled = run.path / CANCELLED
    if cancelled.is_file() and job in cancelled.read_text().split():
        return
    there = slurm.jobs({job}).get(job)
    if there is not None and there.state == "RUNNING":
        slurm.run(["scontrol", "requeue", job])


def _last_job(run: RunDirectory) -> str | None:
    path = _jobs_file(run)
    lines = path.read_text().splitlines() if path.is_file() else []
    return str(json.loads(lines[-1])["job"]) if lines else None


def _note_job(run: RunDirectory, job: str) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    with _jobs_file(run).open("a") as file:
        file.write(json.dumps({"job": job, "time": now, "script": ""}) + "\n")


def _jobs_file(run: RunDirectory) -> Path:
    return run.path / "jobs.jsonl"
