"""Typed configuration of a cluster, of a job on it, and of status, logs and cancel.

Imports nothing heavy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, key_of, not_empty, one_of
from modtrain.distributed.launch import Launch

LAUNCHERS = ("srun", "torchrun")
CONTAINERS = ("none", "apptainer", "pyxis")
RESTARTS = ("requeue", "resubmit", "nothing")
SITE_OPTIONS = ("partition", "account", "qos", "constraint", "reservation")
"""Fields of `ClusterConfig` that are options of sbatch by the same name."""

# What Slurm takes as a time: minutes, [hours:]minutes:seconds, days-hours[:minutes[:seconds]].
_TIME = re.compile(r"\d+|\d+:\d+(:\d+)?|\d+-\d+(:\d+){0,2}|UNLIMITED")
_PLAIN = re.compile(r"[^\x00-\x1f\x7f]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_=,+-][A-Za-z0-9_=.,+-]*")
_JOB_ID = re.compile(r"\d+(_\d+)?")
_OTHER_CLUSTER = re.compile(r"-M.*|--clusters?([= ].*)?")


@dataclass
class ClusterConfig:
    """What differs from site to site. Each site has a file in the group ``cluster``.

    partition, account, qos, constraint, reservation: the option of sbatch of this name; null leaves
        it out.
    gres: name of the GPUs' generic resource; null asks by ``--gpus-per-node``.
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
    network_interface: the interface that NCCL and gloo use.
    scratch: directory on a node's own disk; null: the system's.
    options: further sbatch options, one per line of the script.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    gres: str | None = None
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
    scratch: str | None = None
    options: list[str] = field(default_factory=list)

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the site's description."""
        problems = [
            *one_of(self, prefix, "launcher", LAUNCHERS),
            *one_of(self, prefix, "container", CONTAINERS),
            *one_of(self, prefix, "restart", RESTARTS),
            *at_least(self, prefix, 0, "gpus_per_node", "retry_delay"),
            *at_least(self, prefix, 1, "cpus_per_process", "lead", "grace"),
            *above_zero(self, prefix, "gpu_memory"),
            *time_problems(self, prefix),
            *self._text_problems(prefix),
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

    def _text_problems(self, prefix: str) -> list[Problem]:
        """Find values with a control character, which would break a line of the script."""
        names = (*SITE_OPTIONS, "gres", "gpu_type", "memory_per_node")
        values = [(name, getattr(self, name)) for name in names]
        values += [("options", option) for option in self.options]
        remedy = "write it on one line"
        return [
            Problem(key_of(prefix, name), repr(value), "has a control character in it", remedy)
            for name, value in values
            if value is not None and not _PLAIN.fullmatch(value)
        ]


@dataclass
class SubmitConfig:
    """A job on the cluster. What modtrain does in it is given by the verb's own overrides.

    nodes: how many nodes.
    gpus_per_node: GPUs of each node, with a process each; null: the site's.
    processes_per_node: processes of each node without GPUs; null: one.
    time: the limit, as Slurm writes it: ``30`` (minutes), ``12:00:00``, ``2-00:00:00``; null takes
        the site's.
    chain: number of jobs that run one after the other, for sites that do not requeue. Each resumes
        where the last one stopped, and does nothing once the run is complete. "complete": as many
        jobs as it takes, each submitted by the last one.
    after: a job's id; this job starts when that one has ended with success. Not with
        restart=resubmit: a job that stops at its time limit never ends with success.
    array: jobs that differ in these overrides, by name: ``{low: ["optimizer.lr=1e-4"]}``; each is
        the run ``<name>/<its name>``. at_once: how many of them may run at a time; null: all.
    dry_run: check and write everything, and submit nothing.
    """

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    nodes: int = 1
    gpus_per_node: int | None = None
    processes_per_node: int | None = None
    time: str | None = None
    chain: str | None = None
    after: str | None = None
    array: dict[str, list[str]] = field(default_factory=dict)
    at_once: int | None = None
    dry_run: bool = False

    @property
    def processes(self) -> int:
        """Processes on each node."""
        return self.gpus or self.processes_per_node or 1

    @property
    def gpus(self) -> int:
        """GPUs on each node."""
        return self.cluster.gpus_per_node if self.gpus_per_node is None else self.gpus_per_node

    @property
    def launch(self) -> Launch:
        """The launch of rank 0 of the run."""
        return Launch(self.nodes * self.processes, 0, 0, self.processes)

    @property
    def is_resubmitted(self) -> bool:
        """Whether a new job, with an id of its own, resumes the run when this one stops."""
        if self.chain is None:
            return self.cluster.restart == "resubmit"
        return self.chain == "complete"

    @property
    def num_chained(self) -> int:
        """Number of jobs submitted at once, each waiting for the one before."""
        return int(self.chain) if self.chain is not None and self.chain.isdecimal() else 1

    def problems(self) -> list[Problem]:
        """Everything wrong with the job."""
        problems = [
            *self.cluster.problems("cluster"),
            *at_least(self, "", 1, "nodes", "processes_per_node", "at_once"),
            *at_least(self, "", 0, "gpus_per_node"),
            *time_problems(self, ""),
        ]
        if self.gpus > self.cluster.gpus_per_node:
            reason = f"is more than a node's cluster.gpus_per_node={self.cluster.gpus_per_node}"
            remedy = "use fewer per node and more nodes"
            problems.append(Problem("gpus_per_node", self.gpus, reason, remedy))
        if self.processes_per_node is not None and self.gpus > 0:
            reason = f"has no meaning with {self.gpus} GPUs a node: each has one process"
            remedy = "leave it out, or set gpus_per_node=0"
            problems.append(Problem("processes_per_node", self.processes_per_node, reason, remedy))
        limit = self.time or self.cluster.time
        if not time_problems(self, "") and not problems and seconds_of(limit) <= self.cluster.lead:
            reason = f"is not longer than cluster.lead={self.cluster.lead} seconds"
            remedy = "it would be signalled to save at its start: raise time, or lower cluster.lead"
            problems.append(Problem("time", limit, reason, remedy))
        chain = self.chain
        if chain not in (None, "complete") and not (chain.isdecimal() and int(chain)):
            remedy = "give a number, or complete"
            problems.append(Problem("chain", chain, "is not a number of jobs", remedy))
        if self.after is not None and not _JOB_ID.fullmatch(self.after):
            remedy = "give the id that sbatch printed"
            problems.append(Problem("after", self.after, "is not a job id", remedy))
        if self.after is not None and self.cluster.restart == "resubmit":
            reason = (
                "would wait for ever with cluster.restart=resubmit: a job that stops with work"
                " left does not end with success, and a job with another id resumes it"
            )
            remedy = (
                "submit this once modtrain status shows complete; if that job ends within its"
                " time limit, add cluster.restart=nothing"
            )
            problems.append(Problem("after", self.after, reason, remedy))
        if chain is not None and self.array:
            remedy = "leave one of them out"
            problems.append(Problem("chain", chain, "has no meaning with an array", remedy))
        if self.at_once is not None and not self.array:
            reason = "has no meaning without an array"
            problems.append(Problem("at_once", self.at_once, reason, "leave it out"))
        remedy = "use letters, digits, dots, dashes and underscores"
        return problems + [
            Problem("array", name, "is not a plain directory name", remedy)
            for name in self.array
            if not _PLAIN_NAME.fullmatch(name)
        ]


@dataclass
class StatusConfig:
    """Which runs to show.

    run: one of them, in detail, or a directory of runs; null: all below ``runs_dir``.
    sweep: the sweep whose table is shown.
    runs_dir: where runs live.
    cost: what the runs took in place of their state: GPU-hours or core-hours, time in the queue,
        steps made again, MFU, restarts by cause. Written to ``cost.json`` of each run as well.
    """

    run: str | None = None
    sweep: str | None = None
    runs_dir: str = "runs"
    cost: bool = False

    def problems(self) -> list[Problem]:
        """Everything wrong with the request."""
        if self.sweep is None:
            return []
        problems = []
        if self.run is not None:
            remedy = "leave one of them out"
            problems.append(Problem("sweep", self.sweep, "cannot be combined with run", remedy))
        if self.cost:
            remedy = f"write run={self.sweep} cost=true, for all runs below it"
            problems.append(Problem("sweep", self.sweep, "cannot be combined with cost", remedy))
        return problems


@dataclass
class LogsConfig:
    """Whose output to show.

    run: the run's name below ``runs_dir``.
    runs_dir: where runs live.
    follow: continue until the run's jobs have ended, across requeues and a chain.
    lines: number of last lines shown first.
    job: one of the run's jobs, a task of an array as ``job='"123_4"'``; null takes the newest that
        has started.
    """

    run: str | None = None
    runs_dir: str = "runs"
    follow: bool = False
    lines: int = 50
    job: str | None = None

    def problems(self) -> list[Problem]:
        """Everything wrong with the request."""
        problems = [
            *not_empty(self, "", "run", "add run=my_run"),
            *at_least(self, "", 0, "lines"),
        ]
        if self.job is not None and not _JOB_ID.fullmatch(self.job):
            remedy = "give one that `modtrain status` shows"
            problems.append(Problem("job", self.job, "is not a job id", remedy))
        return problems


@dataclass
class CancelConfig:
    """Whose jobs to end.

    run: the run's name below ``runs_dir``.
    runs_dir: where runs live.
    save: let a running job save a checkpoint first.
    wait: seconds allowed for that; then the job is cancelled.
    """

    run: str | None = None
    runs_dir: str = "runs"
    save: bool = True
    wait: float = 300

    def problems(self) -> list[Problem]:
        """Everything wrong with the request."""
        return [
            *not_empty(self, "", "run", "add run=my_run"),
            *at_least(self, "", 0, "wait"),
        ]


def is_of_job(override: str) -> bool:
    """Whether an override configures the job, and not what the job runs."""
    # The part before the key's first dot.
    key = override.partition("=")[0].lstrip("+~").split("@")[0].replace("/", ".").split(".")[0]
    return key in job_keys()


def job_keys() -> list[str]:
    """Return the keys of a job and of its cluster."""
    keys = [f.name for f in fields(SubmitConfig)]
    return [*keys, *(f"cluster.{f.name}" for f in fields(ClusterConfig))]


def time_problems(config: ClusterConfig | SubmitConfig, prefix: str) -> list[Problem]:
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
