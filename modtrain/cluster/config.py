"""Typed configuration of a job on a cluster, and of status, logs, wait and cancel.

Imports nothing heavy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields

from modtrain.cluster.site import ClusterConfig, seconds_of, time_problems
from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, not_empty
from modtrain.distributed.launch import Launch

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_=,+-][A-Za-z0-9_=.,+-]*")
_JOB_ID = re.compile(r"\d+(_\d+)?")
_DATE = r"\d{4}-\d{2}-\d{2}"
_CLOCK = r"\d{1,2}:\d{2}(:\d{2})?"
_BEGIN = re.compile(
    r"(now|midnight|noon|elevenses|fika|teatime|today|tomorrow)"
    r"(\+\d+(second|minute|hour|day|week)?s?)?"
    rf"|{_CLOCK}( ?[AaPp][Mm])?|{_DATE}(T{_CLOCK})?"
)


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
    begin: when it may start at the earliest, as sbatch takes it: ``now+2hours``, ``20:00``,
        ``2026-12-24T18:00``; null: at once.
    after: a job's id, or the name of a run or of a preparation, whose newest job it then is; this
        job starts when that one has ended with success. Data that it prepares need not be there.
        Not with restart=resubmit: a job that stops at its time limit never ends with success.
    array: jobs that differ in these overrides, by name: ``{low: ["optimizer.lr=1e-4"]}``; each is
        the run ``<name>/<its name>``. at_once: how many of them, or of the workers, may run at a
        time; null: all.
    workers: of a search: so many jobs work on one study, as an array; null: one job.
    dry_run: check and write everything, and submit nothing.
    """

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    nodes: int = 1
    gpus_per_node: int | None = None
    processes_per_node: int | None = None
    time: str | None = None
    chain: str | None = None
    begin: str | None = None
    after: str | None = None
    array: dict[str, list[str]] = field(default_factory=dict)
    workers: int | None = None
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
            *at_least(self, "", 1, "nodes", "processes_per_node", "at_once", "workers"),
            *at_least(self, "", 0, "gpus_per_node"),
            *time_problems(self, ""),
        ]
        if self.workers and self.array:
            reason, remedy = "has no meaning for an array, whose jobs are given", "leave it out"
            problems.append(Problem("workers", self.workers, reason, remedy))
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
        if self.begin is not None and not _BEGIN.fullmatch(self.begin):
            remedy = "write now+2hours, 2026-12-24T18:00, or in quotes '20:00'"
            problems.append(Problem("begin", self.begin, "is not a time that Slurm takes", remedy))
        if chain is not None and (self.array or self.workers):
            remedy = "leave one of them out"
            what = "an array" if self.array else "workers"
            problems.append(Problem("chain", chain, f"has no meaning with {what}", remedy))
        if self.at_once is not None and not self.array and not self.workers:
            reason = "has no meaning without an array or workers"
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
class WaitConfig:
    """Which run to wait for.

    run: the run's name below ``runs_dir``, or a directory of runs: then all of them.
    runs_dir: where runs live.
    timeout: seconds after which to give up; null: never. interval: seconds between two looks.
    """

    run: str | None = None
    runs_dir: str = "runs"
    timeout: float | None = None
    interval: float = 10.0

    def problems(self) -> list[Problem]:
        """Everything wrong with the request."""
        return [
            *not_empty(self, "", "run", "add run=my_run"),
            *at_least(self, "", 0, "timeout"),
            *above_zero(self, "", "interval"),
        ]


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


def is_job_id(text: str) -> bool:
    """Whether ``text`` has the form of a job's id, or of one of an array's task."""
    return _JOB_ID.fullmatch(text) is not None


def is_of_job(override: str) -> bool:
    """Whether an override configures the job, and not what the job runs."""
    # The part before the key's first dot.
    key = override.partition("=")[0].lstrip("+~").split("@")[0].replace("/", ".").split(".")[0]
    return key in job_keys()


def job_keys() -> list[str]:
    """Return the keys of a job and of its cluster."""
    keys = [f.name for f in fields(SubmitConfig)]
    return [*keys, *(f"cluster.{f.name}" for f in fields(ClusterConfig))]
