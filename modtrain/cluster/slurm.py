"""Queries to Slurm, by its own commands."""

from __future__ import annotations

import datetime
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from modtrain.common.errors import ModtrainError

# squeue truncates a field to its width. The command comes last: a path may contain separators.
_FIELDS = (
    *("JobArrayID:40", "State:24", "Reason:80", "NodeList:400", "TimeLeft:24", "RestartCnt:12"),
    *("StartTime:24", "Command:4096"),
)
_FORMAT = ",".join(f"{field}|" for field in _FIELDS)
_RECORD = re.compile(r"^(?=\d\S* *\|)", re.MULTILINE)
_FINISHED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
)
_PENDING = (
    *("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD"),
    *("RESV_DEL_HOLD", "SPECIAL_EXIT"),
)
# A command for a thousand jobs is truncated to this in errors.
_MAX_COMMAND_CHARS = 300
# A user's defaults in these variables would change queries, and override a script's directives.
# Inside an allocation SLURM_... describe that job: sbatch passes them on, and srun in the new job
# would use them (man sbatch, man srun).
_REMOVED_VARIABLES = (
    *("SLURM_", "_SLURM_SPANK_", "SQUEUE_", "SCANCEL_", "SACCT_", "SBATCH_TIMELIMIT"),
    *("SBATCH_REQUEUE", "SBATCH_NO_REQUEUE", "SBATCH_ARRAY_INX", "SBATCH_SIGNAL"),
    *("SBATCH_OPEN_MODE", "SBATCH_OUTPUT", "SBATCH_JOB_NAME"),
)
# These select the controller and authenticate the user.
_KEPT_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
_DENIED = "Access/permission denied"


class SlurmError(ModtrainError):
    """A Slurm command failed."""


class DeniedError(SlurmError):
    """Slurm denies this user the operation. message: Slurm's output, without the command."""

    def __init__(self, text: str, message: str) -> None:
        self.message = message
        super().__init__(text)

    def names(self, job: str) -> bool:
        """Whether the message names ``job``."""
        lines = [line for line in self.message.splitlines() if _DENIED in line]
        return any(job in re.findall(r"\w+", line) for line in lines)


_OTHER_ACCOUNT = (
    "set cluster.account to one that `scontrol show partition` allows, or another cluster.partition"
)
_OTHER_QOS = "set cluster.qos to one that `scontrol show partition` allows"
# Why a job waits that nothing but a change of it, or of the site, lets start, with the remedy.
_NEVER_STARTS = {
    "PartitionTimeLimit": "lower time=, or choose another cluster.partition: `sinfo -o '%P %l'`",
    "PartitionNodeLimit": "take fewer nodes=, or another cluster.partition: `sinfo -o '%P %D %s'`",
    # In Slurm's words, which depend on its version, and on whether it has accounting.
    "AccountNotAllowed": _OTHER_ACCOUNT,
    "can't use this partition": _OTHER_ACCOUNT,
    "account not permitted to use this partition": _OTHER_ACCOUNT,
    "QOSNotAllowed": _OTHER_QOS,
    "QOS not permitted to use this partition": _OTHER_QOS,
    "InvalidAccount": "set cluster.account to one of `sacctmgr show associations user=$USER`",
    "InvalidQOS": "set cluster.qos to one of `sacctmgr show associations user=$USER`",
    "BadConstraints": "compare cluster.constraint, nodes, GPUs and memory with `sinfo -Nl`",
    "DependencyNeverSatisfied": "the awaited job has not ended well: leave after= out once it has",
    "JobHeldAdmin": "ask the site's administrators, who hold it",
    "QOSMaxWallDurationPerJobLimit": "lower time=, or choose another cluster.qos",
    "AssocMaxWallDurationPerJobLimit": "lower time=, or choose another cluster.account",
    "QOSMaxNodePerJobLimit": "take fewer nodes=, or choose another cluster.qos",
    "AssocMaxNodePerJobLimit": "take fewer nodes=, or choose another cluster.account",
}


@dataclass(frozen=True)
class SlurmJob:
    """A job that Slurm knows.

    id: ``123``, of an array's task ``123_4``. state: Slurm's long name. reason: why it is pending
    or ended; may be empty. nodes: as Slurm abbreviates them. time_left: until the time limit, as
    Slurm prints it. restarts: number of requeues. start: actual or expected start, local ISO time;
    None: unknown. command: the script's path.
    """

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    time_left: str = ""
    restarts: int = 0
    start: str | None = None
    command: str = ""

    @property
    def number(self) -> tuple[int, ...]:
        """The id as numbers, which sort jobs by submission."""
        return tuple(int(part) for part in re.findall(r"\d+", self.id))

    @property
    def is_finished(self) -> bool:
        """Whether the job has ended."""
        return self.state in _FINISHED

    @property
    def is_pending(self) -> bool:
        """Whether the job waits for its start, or for a restart."""
        return self.state in _PENDING


@dataclass(frozen=True)
class Allocation:
    """A time for which a job had nodes, as Slurm's accounting has it; a requeued job has several.

    seconds: of it, until now if it is at work. queued: seconds that it waited before, without
    those in which it was not to start yet. gpus, cpus: of all nodes.
    """

    job: str
    seconds: float
    queued: float
    gpus: int
    cpus: int


def never_starts(job: SlurmJob) -> str | None:
    """Return the remedy where ``job`` waits for what cannot come; None where it may start."""
    if not job.is_pending:
        return None
    return next((remedy for part, remedy in _NEVER_STARTS.items() if part in job.reason), None)


def has_slurm() -> bool:
    """Whether Slurm's commands are on the PATH."""
    return shutil.which("squeue") is not None


def run(
    command: Sequence[str], timeout: float = 60, without_variables: Collection[str] = ()
) -> str:
    """Run a Slurm command, given as a list of arguments, and return its output.

    timeout: seconds; squeue and its like wait for a busy controller by themselves.
    without_variables: variables that the command is not to see.

    Raises:
        DeniedError: the user has no permission.
        SlurmError: it is missing, fails, or does not answer; with the command and its stderr.
    """
    shown = shlex.join(command)
    if len(shown) > _MAX_COMMAND_CHARS:
        shown = f"{shown[:_MAX_COMMAND_CHARS]}..."
    environment = {
        name: value
        for name, value in os.environ.items()
        if (name in _KEPT_VARIABLES or not name.startswith(_REMOVED_VARIABLES))
        and name not in without_variables
    }
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} is not on the PATH\nremedy: run this on a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{shown} did not answer in {timeout:g} s\n"
            "remedy: check the controller with `scontrol ping`, and try again"
        ) from None
    if done.returncode != 0:
        message = done.stderr.strip() or done.stdout.strip() or "no message"
        text = f"{shown} failed with {done.returncode}: {message}\nremedy: {_remedy(message)}"
        raise DeniedError(text, message) if _DENIED in message else SlurmError(text)
    return done.stdout


def jobs(ids: Collection[str]) -> dict[str, SlurmJob]:
    """Query Slurm once for all of ``ids`` and return those that it knows.

    An array's tasks are returned under their own ids, the most active one under the array's too.
    Slurm forgets a finished job after some minutes: a job that is not returned has ended.

    Raises:
        SlurmError: Slurm does not answer.
    """
    if not ids:
        return {}
    command = ["squeue", "--noheader", "--array", "--states=all", f"--Format={_FORMAT}"]
    try:
        output = run([*command, f"--jobs={','.join(sorted(ids))}"])
    except SlurmError as error:
        # squeue reports an unknown id as an error only for a query of a single job.
        if "Invalid job id" in str(error):
            return {}
        raise
    jobs_by_id: dict[str, SlurmJob] = {}
    for job in parse_jobs(output):
        jobs_by_id[job.id] = job
        array = job.id.partition("_")[0]
        if array not in jobs_by_id or _activity_rank(job) > _activity_rank(jobs_by_id[array]):
            jobs_by_id[array] = job
    return jobs_by_id


def allocations(ids: Collection[str]) -> dict[str, list[Allocation]]:
    """Return what Slurm's accounting has of jobs, by the ids that are asked for.

    Empty where there is no accounting.

    Raises:
        SlurmError: it does not answer.
    """
    if not ids or shutil.which("sacct") is None:
        return {}
    fields = "JobID,Eligible,Start,End,AllocCPUS,AllocTRES"
    command = ["sacct", "--allocations", "--duplicates", "--noheader", "--parsable2"]
    try:
        output = run([*command, f"--format={fields}", f"--jobs={','.join(sorted(ids))}"])
    except SlurmError as error:
        if "accounting storage is disabled" in str(error).lower():
            return {}
        raise
    by_job: dict[str, list[Allocation]] = {}
    for line in output.splitlines():
        allocation = _allocation(line)
        if allocation is not None:
            by_job.setdefault(allocation.job, []).append(allocation)
    return by_job


def _allocation(line: str) -> Allocation | None:
    """Parse a line of sacct; None for a job that has had no nodes."""
    parts = line.split("|")
    if len(parts) != 6:
        return None
    job, *moments, cpus, resources = parts
    eligible, start, end = map(_seconds_since_1970, moments)
    if start is None:
        return None
    until = time.time() if end is None else end
    gpus = re.search(r"gres/gpu=(\d+)", resources)
    queued = 0.0 if eligible is None else max(0.0, start - eligible)
    num_cpus = int(cpus) if cpus.isdecimal() else 0
    num_gpus = int(gpus[1]) if gpus else 0
    return Allocation(job, max(0.0, until - start), queued, num_gpus, num_cpus)


def _seconds_since_1970(text: str) -> float | None:
    """Read a local time of Slurm; None for ``Unknown`` and its like."""
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def cancel(ids: Iterable[str]) -> None:
    """Cancel these jobs at once, without a signal to save first.

    Raises:
        DeniedError: one of them is another user's.
        SlurmError: one of them cannot be cancelled, or has ended already.
    """
    run(["scancel", *ids])


def signal_save(ids: Iterable[str]) -> None:
    """Send USR1 to these jobs' scripts, which forward it to their tasks once.

    Raises:
        DeniedError: one of them is another user's.
        SlurmError: one of them is not running.
    """
    run(["scancel", "--batch", "--signal=USR1", *ids])


def parse_jobs(output: str) -> list[SlurmJob]:
    """Parse the output of squeue in this module's format."""
    parsed = []
    for record in _RECORD.split(output):
        fields = [field.strip() for field in record.split("|", len(_FIELDS) - 1)]
        if len(fields) < len(_FIELDS):
            continue
        name, state, reason, nodes, time_left, restarts, start, command = fields
        reason = "" if reason == "None" else reason
        num_restarts = int(restarts) if restarts.isdecimal() else 0
        time = None if start in ("N/A", "") else start
        path = command.removesuffix("|").rstrip()
        parsed.append(SlurmJob(name, state, reason, nodes, time_left, num_restarts, time, path))
    return parsed


def _activity_rank(job: SlurmJob) -> int:
    return 0 if job.is_finished else 1 if job.is_pending else 2


def _remedy(message: str) -> str:
    remedies = {
        "Unable to contact slurm": "check the controller with `scontrol ping`",
        "configuration source": "run this on a login node of the cluster: no Slurm is set up here",
        "Invalid job id": "list your jobs with `squeue --me`",
        _DENIED: "the job is another user's: ask them, or an operator",
        "Invalid account": "set cluster.account to one of `sacctmgr show associations user=$USER`",
        "Invalid qos": "set cluster.qos to one of `sacctmgr show associations user=$USER`",
        "invalid partition": "set cluster.partition to one of `sinfo`",
        "Requested node configuration": "compare nodes, GPUs and memory with `sinfo -Nl`",
        "Socket timed out": "the controller is busy: try again",
    }
    return next(
        (remedy for part, remedy in remedies.items() if part in message),
        "fix what the message names",
    )
