"""The few questions that modtrain asks of Slurm, by Slurm's own commands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from modtrain.common.errors import ModtrainError

# squeue cuts a field at its width; the command comes last, for a path may hold anything.
_FIELDS = (
    *("JobArrayID:40", "State:24", "Reason:80", "NodeList:400", "TimeLeft:24", "RestartCnt:12"),
    *("StartTime:24", "Command:4096"),
)
_FORMAT = ",".join(f"{field}|" for field in _FIELDS)
_RECORD = re.compile(r"^(?=\d\S* *\|)", re.MULTILINE)
_FINISHED = frozenset(
    (
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
        *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
    )
)
_PENDING = frozenset(
    (
        *("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD"),
        *("RESV_DEL_HOLD", "SPECIAL_EXIT"),
    )
)
# Of a command in an error; one for a thousand jobs says no more than this.
_MAX_COMMAND_CHARS = 300
# A user's defaults for these would change what is asked, or what a script says of itself, to which
# sbatch prefers them. Inside an allocation SLURM_... says what that job is and has: sbatch hands it
# on, and srun in the new job would take it for its own (man sbatch, man srun).
_REMOVED_VARIABLES = (
    *("SLURM_", "_SLURM_SPANK_", "SQUEUE_", "SCANCEL_", "SBATCH_TIMELIMIT"),
    *("SBATCH_REQUEUE", "SBATCH_NO_REQUEUE", "SBATCH_ARRAY_INX", "SBATCH_SIGNAL"),
    *("SBATCH_OPEN_MODE", "SBATCH_OUTPUT", "SBATCH_JOB_NAME"),
)
# These say which controller is asked, and who asks.
_KEPT_VARIABLES = frozenset(("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"))
_DENIED = "Access/permission denied"


class SlurmError(ModtrainError):
    """Slurm did not do what it was asked to."""


class DeniedError(SlurmError):
    """Slurm does not let this user do that. said: Slurm's words, without the command."""

    def __init__(self, text: str, message: str) -> None:
        self.message = message
        super().__init__(text)

    def names(self, job: str) -> bool:
        """Whether ``job`` is one of those that it is about."""
        lines = [line for line in self.message.splitlines() if _DENIED in line]
        return any(job in re.findall(r"\w+", line) for line in lines)


@dataclass(frozen=True)
class SlurmJob:
    """A job that Slurm knows.

    id: ``123``, of an array's task ``123_4``. state: Slurm's long name. reason: why it waits or
    ended, empty without one. nodes: as Slurm abbreviates them. time_left: of its limit, as Slurm
    says it. restarts: how often it was requeued. start: when it began or is expected to, local
    time in ISO's spelling; None: Slurm does not say. command: the script's path.
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
        """Its id as numbers, which order jobs as they were given to Slurm."""
        return tuple(int(part) for part in re.findall(r"\d+", self.id))

    @property
    def is_finished(self) -> bool:
        """Whether it has come to its end."""
        return self.state in _FINISHED

    @property
    def is_pending(self) -> bool:
        """Whether it has yet to begin, or to begin again."""
        return self.state in _PENDING


def has_slurm() -> bool:
    """Whether Slurm's commands are on the PATH."""
    return shutil.which("squeue") is not None


def run(
    command: Sequence[str], timeout: float = 60, without_variables: Collection[str] = ()
) -> str:
    """Run one of Slurm's commands, given as its words, and return its output.

    timeout: seconds; squeue and its like wait for a busy controller by themselves. without:
    variables that the command is not to see.

    Raises:
        DeniedError: this user may not do that.
        SlurmError: it is not there, fails, or does not answer; with its words and its stderr.
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
            f"there is no {command[0]} here\nremedy: do this on a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{shown} did not answer in {timeout:g} s\n"
            "remedy: see by `scontrol ping` whether the controller is up, and try again"
        ) from None
    if done.returncode != 0:
        message = done.stderr.strip() or done.stdout.strip() or "it says nothing"
        text = f"{shown} failed with {done.returncode}: {message}\nremedy: {_remedy(message)}"
        raise DeniedError(text, message) if _DENIED in message else SlurmError(text)
    return done.stdout


def jobs(ids: Collection[str]) -> dict[str, SlurmJob]:
    """Ask Slurm once for all of ``ids`` and return those that it knows.

    An array's tasks come under their own ids, and the liveliest of them under the array's as well.
    Slurm forgets a finished job after some minutes: one that is not in the answer is over.

    Raises:
        SlurmError: Slurm does not answer.
    """
    if not ids:
        return {}
    command = ["squeue", "--noheader", "--array", "--states=all", f"--Format={_FORMAT}"]
    try:
        output = run([*command, f"--jobs={','.join(sorted(ids))}"])
    except SlurmError as error:
        # Only where it is asked for a single job is squeue sure that it means an error.
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


def cancel(ids: Iterable[str]) -> None:
    """End these jobs, whatever they do; without a signal that they could save at.

    Raises:
        DeniedError: one of them is another user's.
        SlurmError: one of them cannot be ended, or is at its end already.
    """
    run(["scancel", *ids])


def signal_save(ids: Iterable[str]) -> None:
    """Send USR1 to these jobs' scripts, which pass it on to their tasks once.

    Raises:
        DeniedError: one of them is another user's.
        SlurmError: one of them is not running.
    """
    run(["scancel", "--batch", "--signal=USR1", *ids])


def parse_jobs(output: str) -> list[SlurmJob]:
    """Read what squeue printed in this module's format."""
    parsed = []
    for record in _RECORD.split(output):
        fields = [field.strip() for field in record.split("|", len(_FIELDS) - 1)]
        if len(fields) < len(_FIELDS):
            continue
        name, state, reason, nodes, time_left, restarts, start, command = fields
        parsed.append(
            SlurmJob(
                id=name,
                state=state,
                reason="" if reason == "None" else reason,
                nodes=nodes,
                time_left=time_left,
                restarts=int(restarts) if restarts.isdecimal() else 0,
                start=None if start in ("N/A", "") else start,
                command=command.removesuffix("|").rstrip(),
            )
        )
    return parsed


def _activity_rank(job: SlurmJob) -> int:
    return 0 if job.is_finished else 1 if job.is_pending else 2


def _remedy(message: str) -> str:
    remedies = {
        "Unable to contact slurm": "see by `scontrol ping` whether the controller is up",
        "configuration source": "do this on a login node of the cluster: no Slurm is set up here",
        "Invalid job id": "see by `squeue --me` which jobs there are",
        _DENIED: "the job is another user's: ask them, or an operator",
        "Invalid account": "set cluster.account to one of `sacctmgr show associations user=$USER`",
        "invalid partition": "set cluster.partition to one of `sinfo`",
        "Requested node configuration": "compare nodes, GPUs and memory with `sinfo -Nl`",
        "Socket timed out": "the controller is busy: try again",
    }
    return next(
        (remedy for part, remedy in remedies.items() if part in message), "mend what it names"
    )
