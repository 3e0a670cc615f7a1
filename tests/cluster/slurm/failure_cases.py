"""What is done to runs on a cluster, and how each comes to its end: the table of the failures."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modtrain.checkpoint.recovery import whole_checkpoints
from tests.cluster.slurm.disturbed import Disturbed

LATIN = "ValueError: the disk spoke Latin"


def fault(at: str, step: int = 0, rank: int | None = 1, do: str = "pause", **more: Any) -> dict:
    return {"name": at, "at": at, "step": step, "rank": rank, "do": do, **more}


MID_STEP, MID_SAVE = fault("step", 10), fault("save", 8)


def happens_inside(_run: Disturbed) -> None:
    """The faults do it."""


@dataclass(frozen=True)
class Case:
    """A run and what is done to it.

    act: called once the job is submitted. job, lines: overrides of the job and of the run. tasks:
    of an array, on a node each. restarts: how often Slurm starts it again; None: it depends.
    causes: a part of each line of failures.tsv; None: who sees it first, the ranks or Slurm, is a
    matter of time. ends: the state of the job at the end.
    """

    name: str
    did: str
    act: Callable[[Disturbed], None] = happens_inside
    strategy: str = "ddp"
    launcher: str = "srun"
    faults: tuple[dict[str, Any], ...] = (MID_STEP,)
    job: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    restarts: int | None = 1
    causes: tuple[str, ...] | None = ()
    ends: str = "COMPLETED"
    conf: str = ""
    share_mb: int = 0


# ---- what is done


def signals(rank: int = 1, name: str = "KILL") -> Callable[[Disturbed], None]:
    def act(run: Disturbed) -> None:
        run.kill_rank(*run.wait_at_fault("step", rank), name)
        run.release("step")

    return act


def cuts_power(place: str, rank: int = 1) -> Callable[[Disturbed], None]:
    def act(run: Disturbed) -> None:
        node, _ = run.wait_at_fault(place, rank)
        run.cluster.kill_node(node)

    return act


def kills_slurmd_for_a_while(run: Disturbed) -> None:
    node, _ = run.wait_at_fault("step")
    run.cluster.kill_slurmd(node)
    time.sleep(2)
    run.cluster.start_slurmd(node)
    run.release("step")


def kills_slurmd(run: Disturbed) -> None:
    node, _ = run.wait_at_fault("step")
    run.cluster.kill_slurmd(node)
    # Slurm takes the node for dead, and the job from it.
    run.cluster.wait(run.job, "PENDING", timeout=120)


def restarts_controller(run: Disturbed) -> None:
    run.wait_at_fault("step")
    run.cluster.kill_controller()
    run.cluster.start_controller()
    run.release("step")


def takes_controller_away(run: Disturbed) -> None:
    node, pid = run.wait_at_fault("step")
    run.cluster.kill_controller()
    run.kill_rank(node, pid)
    run.wait_for_output("requeueing failed")
    run.cluster.start_controller()


def drains_and_requeues(run: Disturbed) -> None:
    node, _ = run.wait_at_fault("step")
    run.cluster.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    run.cluster.run("scontrol", "requeue", run.job)


def preempts(place: str) -> Callable[[Disturbed], None]:
    def act(run: Disturbed) -> None:
        run.wait_at_fault(place)
        run.preempt()

    return act


def is_slow(run: Disturbed) -> None:
    run.reached(4)
    until = time.monotonic() + 12
    while time.monotonic() < until:
        with run.cluster.share_frozen():
            time.sleep(1)
        time.sleep(0.1)


def is_full(run: Disturbed) -> None:
    node, process = run.wait_at_fault("step")
    with run.cluster.share_full():
        run.release("step")
        # Its messages may not fit in the job's log, which is there too.
        there = ("test", "-e", f"/proc/{process}")
        run.until("failing", lambda: run.cluster.on(node, *there).returncode)
        # What was saved before is whole, and stays so.
        assert whole_checkpoints(run.run / "checkpoints")
        time.sleep(10)


def loses_share(run: Disturbed) -> None:
    run.wait_at_fault("step")
    with run.cluster.share_removed():
        run.release("step")
        time.sleep(15)


def waits_for_stacks(run: Disturbed) -> None:
    stacks = run.run / "logs/stacks-rank-00001.txt"
    run.until(
        "showing where it hangs", lambda: stacks.exists() and "in pause" in stacks.read_text()
    )


def waits_for_the_limit(run: Disturbed) -> None:
    run.wait_at_fault("step")


# ---- the table

TORCHRUN = "torchrun"
RAISES = (fault("step", 10, do="raise"),)
# Before the first checkpoint: one that comes in between would be progress.
RAISES_ALWAYS = (fault("step", 2, do="raise", always=True),)
KILLED_ALWAYS = (fault("step", 2, 0, "kill", always=True),)
RANK_0 = (fault("step", 10, 0),)
SLOW = (fault("step", 0, None, "slow", seconds=0.3, always=True),)
HARD = "PartitionName=hard Nodes=ALL PriorityTier=1 GraceTime=0 MaxTime=INFINITE\n"
ON_SHARE = {"restarts": None, "causes": None, "share_mb": 96}


def stuck(name: str, did: str, act: Callable[[Disturbed], None], *strategy: str) -> Case:
    """A rank that the others have to give up on."""
    impatient, causes = ("strategy.timeout=15",), ("rank 1 on node",)
    return Case(name, did, act, *strategy, lines=impatient, causes=causes)


def preempted(name: str, at: dict[str, Any], when: str, signal: str = "USR1", **more: Any) -> Case:
    """A job of low priority that Slurm takes from its nodes at the place of a fault."""
    did, job = f"{signal} by preemption {when}", ("cluster.partition=low", *more.pop("job", ()))
    conf = "SlurmctldParameters=enable_configless\n" if signal == "TERM" else ""
    return Case(name, did, preempts(at["at"]), faults=(at,), job=job, conf=conf, **more)


def array(name: str, *signal: str, **more: Any) -> Case:
    when, job = "in a step of both tasks", ("nodes=1", "processes_per_node=2")
    return preempted(name, MID_STEP, when, *signal, job=job, tasks=("a", "b"), **more)


CASES = [
    Case("kill -9", "rank 1 is killed", signals(), causes=("",)),
    Case(
        *("kill -9 of rank 0", "rank 0 is killed", signals(0), "fsdp", TORCHRUN, RANK_0),
        causes=("",),
    ),
    Case("raises", "rank 1 raises once", strategy="fsdp_tp", faults=RAISES, causes=(LATIN,)),
    Case(
        *("raises under torchrun", "rank 1 raises once", happens_inside, "fsdp_ep", TORCHRUN),
        faults=RAISES,
        causes=(LATIN,),
    ),
    Case(
        "power, mid-step", "the second node loses power in a step", cuts_power("step"), causes=None
    ),
    Case(
        *("power, mid-save", "the second node loses power in a save", cuts_power("save"), "fsdp"),
        faults=(MID_SAVE,),
        causes=None,
    ),
    Case(
        "power of the batch host",
        "the first node, with the job's script, loses power in a step",
        *(cuts_power("step", 0), "fsdp", TORCHRUN, RANK_0),
        causes=None,
    ),
    Case(
        *("slurmd for a while", "slurmd of a node dies and comes back", kills_slurmd_for_a_while),
        restarts=0,
    ),
    Case(
        *("slurmd for good", "slurmd of a node dies and stays away", kills_slurmd, "fsdp"),
        causes=None,
    ),
    Case(
        *("controller restarts", "the controller restarts in a step", restarts_controller),
        strategy="deepspeed_1",
        restarts=0,
    ),
    Case(
        "controller away",
        "a rank is killed while the controller is away",
        takes_controller_away,
        causes=("",),
    ),
    Case(
        *("other nodes", "a node is drained and the job requeued by hand", drains_and_requeues),
        strategy="hsdp",
    ),
    stuck("hang", "rank 1 waits for ever in a step", waits_for_stacks, "fsdp_ep"),
    stuck("stopped process", "rank 1 is stopped (SIGSTOP) in a step", signals(name="STOP")),
    stuck(
        *("stopped process under torchrun", "rank 1 is stopped (SIGSTOP) in a step"),
        *(signals(name="STOP"), "fsdp_tp", TORCHRUN),
    ),
    Case(
        *("restart loop", "rank 1 raises at the same step at each start"),
        faults=RAISES_ALWAYS,
        restarts=2,
        causes=(LATIN,) * 3,
        ends="FAILED",
    ),
    Case(
        *("crash loop of rank 0", "rank 0, which tells how a run ended, is killed at each start"),
        strategy="fsdp",
        faults=KILLED_ALWAYS,
        restarts=2,
        causes=("",) * 3,
        ends="FAILED",
    ),
    preempted("preempted mid-step", MID_STEP, "in a step"),
    preempted("preempted mid-step, TERM", MID_STEP, "in a step", "TERM", strategy="fsdp"),
    preempted("preempted mid-save", MID_SAVE, "in a save", strategy="hsdp"),
    preempted("preempted in imports", fault("imports"), "in imports", strategy="deepspeed_3"),
    preempted("preempted before imports", fault("start"), "before Python has run a line", "TERM"),
    preempted(
        "preempted in evaluation", fault("evaluation"), "in an evaluation", strategy="fsdp_tp"
    ),
    preempted(
        *("preempted under torchrun", MID_STEP, "in a step"), strategy="fsdp_ep", launcher=TORCHRUN
    ),
    preempted(
        *("preempted in imports under torchrun", fault("imports"), "in imports", "TERM"),
        strategy="fsdp",
        launcher=TORCHRUN,
    ),
    preempted(
        *("preempted mid-step, DeepSpeed", MID_STEP, "in a step"),
        strategy="deepspeed_2",
        launcher=TORCHRUN,
    ),
    array("array preempted", strategy="fsdp_cp"),
    array("array preempted, TERM", "TERM", strategy="fsdp", launcher=TORCHRUN),
    Case(
        *("no grace", "preempted, and killed before it can save", preempts("step"), "deepspeed_1"),
        faults=(fault("step", 10, deaf=True),),
        conf=HARD,
        job=("cluster.partition=hard",),
    ),
    Case(
        *("time limit", "USR1 before the time limit", waits_for_the_limit),
        # Slurm is up to a minute early.
        job=("time=3", "cluster.lead=60"),
        lines=("strategy.timeout=200",),
    ),
    Case(
        *("slow disk", "the shared file system stands still for most of 12 s", is_slow, "fsdp"),
        faults=SLOW,
        restarts=0,
        share_mb=96,
    ),
    Case("full disk", "the shared file system is full", is_full, **ON_SHARE),
    Case("lost mount", "the shared file system is away for 15 s", loses_share, **ON_SHARE),
]
