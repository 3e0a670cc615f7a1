"""Typed configuration of a cluster, which differs from site to site. Imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Protocol

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, key_of, one_of

LAUNCHERS = ("srun", "torchrun")
CONTAINERS = ("none", "apptainer", "pyxis")
RESTARTS = ("requeue", "resubmit", "nothing")
SITE_OPTIONS = ("partition", "account", "qos", "constraint", "reservation", "comment")
"""Fields of `ClusterConfig` that are options of sbatch by the same name."""
GPU_REQUESTS = ("per_node", "per_task")
MAIL_EVENTS = (
    *("BEGIN", "END", "FAIL", "REQUEUE", "ALL", "INVALID_DEPEND", "STAGE_OUT", "TIME_LIMIT"),
    *("TIME_LIMIT_90", "TIME_LIMIT_80", "TIME_LIMIT_50", "ARRAY_TASKS"),
)

# What Slurm takes as a time: minutes, [hours:]minutes:seconds, days-hours[:minutes[:seconds]].
_TIME = re.compile(r"\d+|\d+:\d+(:\d+)?|\d+-\d+(:\d+){0,2}|UNLIMITED")
_PLAIN = re.compile(r"[^\x00-\x1f\x7f]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HOSTS = re.compile(r"[A-Za-z0-9._-]+(\[[0-9,-]+\][A-Za-z0-9._-]*)*")
_ADDRESS = re.compile(r"[^\s,@-][^\s,@]*(@[A-Za-z0-9.-]+)?")
# What the script itself gives to srun, and what would start other processes than it counts on.
_SCRIPTS_SRUN_OPTIONS = re.compile(
    r"(-[nNck]\d*|-l|--(ntasks|nodes|ntasks-per-node|cpus-per-task|kill-on-bad-exit|label|gpus"
    r"|gpus-per-node|gpus-per-task|container-image|container-mounts|container-workdir|export|output"
    r"|error|jobid|overlap|pty|multi-prog|no-kill|wait))(=.*)?"
)
_OTHER_CLUSTER = re.compile(r"-M.*|--clusters?([= ].*)?")


class HasTime(Protocol):
    """What has a time limit: a site, or a job; None: the site's."""

    @property
    def time(self) -> str | None:
        """As Slurm writes it."""


@dataclass
class ClusterConfig:
    """What differs from site to site. Each site has a file in the group ``cluster``.

    partition, account, qos, constraint, reservation, comment: the option of sbatch of this name;
        null leaves it out.
    exclude: nodes that no job is to run on, as ``[node7, "gpu[12-14]"]``.
    mail: address to which Slurm writes; mail_on: the events, by sbatch's names.
    on_given_up: program with its arguments that is called when a run is given up, on the node of
        the script and without a shell. Its environment has MODTRAIN_RUN, MODTRAIN_JOB and
        MODTRAIN_CAUSE.
    gres: name of the GPUs' generic resource; null asks by ``--gpus-per-node``.
    gpu_request: ``per_node``, or ``per_task`` where a site wants ``--gpus-per-task``.
    gpu_type: the type of GPU that is requested.
    gpus_per_node: GPUs of a node; 0 is a cluster without.
    gpu_memory: GiB of a GPU, with which the plan is compared; null: unknown.
    cpus_per_process: CPUs of each process.
    memory_per_node: as sbatch's ``--mem`` takes it; "0" is all of the node's.
    time: the time limit of a job, in sbatch's format.
    lead: seconds before the time limit at which a run is signalled to save. grace: seconds between
        the signal of a preemption and the kill. A save that would take longer is not started.
    restart: how a stopped run is restarted: ``requeue``; ``resubmit``, where jobs may not be
        requeued; ``nothing``.
    retry_delay: seconds before a run starts again after a failure; twice as long after each further
        one of the same kind.
    launcher: ``srun``: a task for each process; ``torchrun``: a task for each node.
    container: what runs modtrain: ``none``, ``apptainer`` or ``pyxis``.
    image: the container's image.
    mounts: ``SOURCE[:TARGET]``, what a container sees beside the working directory and the run's.
    python: interpreter with modtrain's packages; null: the one that submits, and in a container
        ``python3``.
    modules: modules that a job loads first.
    source: files that are sourced before them.
    environment: environment variables, such as proxies.
    network_interface: the interface that NCCL and gloo use. nccl_interface, gloo_interface: of
        one of them; null: ``network_interface``.
    scratch: directory on a node's own disk; null: the system's.
    options: further sbatch options, one per line of the script. srun_options: options of the srun
        that starts modtrain's processes, as ``["--mpi=none", "--cpu-bind=cores"]``.
    log_size: MiB of a job's output, after which it is continued in an empty file; three earlier
        parts are kept. num_logs: outputs of jobs that are kept in the directory of a run.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    comment: str | None = None
    exclude: list[str] = field(default_factory=list)
    mail: str | None = None
    mail_on: list[str] = field(default_factory=lambda: ["FAIL"])
    on_given_up: list[str] = field(default_factory=list)
    gres: str | None = None
    gpu_request: str = "per_node"
    gpu_type: str | None = None
    gpus_per_node: int = 8
    gpu_memory: float | None = None
    cpus_per_process: int = 8
    memory_per_node: str | None = None
    time: str = "24:00:00"
    lead: int = 300
    grace: int = 30
    restart: str = "requeue"
    retry_delay: int = 60
    launcher: str = "srun"
    container: str = "none"
    image: str | None = None
    mounts: list[str] = field(default_factory=list)
    python: str | None = None
    modules: list[str] = field(default_factory=list)
    source: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    network_interface: str | None = None
    nccl_interface: str | None = None
    gloo_interface: str | None = None
    scratch: str | None = None
    options: list[str] = field(default_factory=list)
    srun_options: list[str] = field(default_factory=list)
    log_size: int = 64
    num_logs: int = 50

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the site's description."""
        problems = [
            *one_of(self, prefix, "launcher", LAUNCHERS),
            *one_of(self, prefix, "gpu_request", GPU_REQUESTS),
            *one_of(self, prefix, "mail_on", MAIL_EVENTS),
            *one_of(self, prefix, "container", CONTAINERS),
            *one_of(self, prefix, "restart", RESTARTS),
            *at_least(self, prefix, 0, "gpus_per_node", "retry_delay"),
            *at_least(self, prefix, 1, "cpus_per_process", "lead", "grace", "log_size", "num_logs"),
            *above_zero(self, prefix, "gpu_memory"),
            *time_problems(self, prefix),
            *self._text_problems(prefix),
            *self._job_option_problems(prefix),
        ]
        if self.container != "none" and not self.image:
            reason = f"is empty, and {prefix}.container={self.container} runs one"
            remedy = "give the image's file or address"
            problems.append(Problem(key_of(prefix, "image"), "null", reason, remedy))
        for option in self.options:
            if not option.startswith("-"):
                reason = "is not an option of sbatch"
                remedy = "write --exclude=node7, with its dashes"
                problems.append(Problem(key_of(prefix, "options"), option, reason, remedy))
            if _OTHER_CLUSTER.fullmatch(option):
                reason = "sends the job to a controller that squeue and scancel here do not query"
                remedy = "submit on a login node of that cluster, or export SLURM_CLUSTERS"
                problems.append(Problem(key_of(prefix, "options"), option, reason, remedy))
        key, reason = key_of(prefix, "environment"), "is not a valid variable name"
        remedy = "use letters, digits and underscores"
        wrong_names = [name for name in self.environment if not _VARIABLE.fullmatch(name)]
        return problems + [Problem(key, name, reason, remedy) for name in wrong_names]

    def _job_option_problems(self, prefix: str) -> list[Problem]:
        """Find what Slurm would refuse, or what would contradict the script."""
        problems = []
        if self.gpu_request == "per_task" and self.gres is not None:
            reason = f"requests GPUs of each node, and {prefix}.gpu_request=per_task of each task"
            remedy = f"leave it out, or set {prefix}.gpu_request=per_node"
            problems.append(Problem(key_of(prefix, "gres"), self.gres, reason, remedy))
        for name in self.exclude:
            if not _HOSTS.fullmatch(name):
                reason, remedy = "is not the name of nodes", 'write [node7, "gpu[12-14]"]'
                problems.append(Problem(key_of(prefix, "exclude"), name, reason, remedy))
        if self.mail is not None and not _ADDRESS.fullmatch(self.mail):
            reason, remedy = "is no address or user", "give one: me@example.org"
            problems.append(Problem(key_of(prefix, "mail"), self.mail, reason, remedy))
        for option in self.srun_options:
            reason, remedy = "", "write --cpu-bind=cores, with its dashes"
            if not option.startswith("-"):
                reason = "is not an option of srun"
            elif _SCRIPTS_SRUN_OPTIONS.fullmatch(option):
                reason, remedy = "is set by the job's script", "leave it out"
            elif " " in option.partition("=")[0]:
                reason = "has a space before its value, which srun would take for its name"
            if reason:
                problems.append(Problem(key_of(prefix, "srun_options"), option, reason, remedy))
        return problems

    def _text_problems(self, prefix: str) -> list[Problem]:
        """Find values with a control character, which would break a line of the script."""
        names = (*SITE_OPTIONS, "gres", "gpu_type", "memory_per_node")
        values = [(name, getattr(self, name)) for name in names]
        for name in ("options", "srun_options", "on_given_up"):
            values += [(name, text) for text in getattr(self, name)]
        remedy = "write it on one line"
        return [
            Problem(key_of(prefix, name), repr(value), "has a control character in it", remedy)
            for name, value in values
            if value is not None and not _PLAIN.fullmatch(value)
        ]


def time_problems(config: HasTime, prefix: str) -> list[Problem]:
    """Find a time limit that Slurm would reject, or that YAML has read as a number."""
    time, key = config.time, key_of(prefix, "time")
    if time is None or (_TIME.fullmatch(time) and not time.isdecimal()):
        return []
    if not time.isdecimal():
        remedy = "write 30 (minutes), 12:00:00 or 2-00:00:00"
        return [Problem(key, time, "is not a time limit that Slurm accepts", remedy)]
    minutes = int(time)
    # To YAML a bare 4:00:00 is a number to the base 60.
    if minutes < 3600:
        return []
    reason = f"is {minutes} minutes to Slurm, {minutes / 1440:.4g} days"
    clock = f"{minutes // 3600}:{minutes // 60 % 60:02}:{minutes % 60:02}"
    days = f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00"
    remedy = f'write "{clock}" in quotes, or {days} for as many days'
    return [Problem(key, time, reason, remedy)]


def seconds_of(time: str) -> float:
    """Return a Slurm time limit in seconds."""
    if time == "UNLIMITED":
        return float("inf")
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        parts += [0] * (3 - len(parts))
    elif len(parts) < 3:
        # Without days a single number is minutes, and two are minutes and seconds.
        parts = [0, *parts, *([0] * (2 - len(parts)))]
    hours, minutes, seconds = parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
