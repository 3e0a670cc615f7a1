"""What is done to runs on a cluster, and how each comes to its end: the table of the failures."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modtrain.checkpoint.recovery import whole_checkpoints
from tests.cluster.slurm.disturbed import Disturbed

LATIN = "ValueError: the disk spoke Latin"


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
    act: Callable[[Disturbed], None]
    strategy: str = "ddp"
    launcher: str = "srun"
    faults: tuple[dict[str, Any], ...] = ()
    job: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    restarts: int | None = 1
    causes: tuple[str, ...] | None = ()
    ends: str = "COMPLETED"
    conf: str = ""
    share_mb: int = 0


def fault(at: str, step: int = 0, rank: int | None = 1, do: str = "hold", **more: Any) -> dict:
    return {"name": at, "at": at, "step": step, "rank": rank, "do": do, **more}


# ---- what is done


def nothing(_run: Disturbed) -> None:
    """It happens inside."""


def kills_a_rank(run: Disturbed) -> None:
    run.kill_rank(*run.held("step"))


def kills_rank_0(run: Disturbed) -> None:
    run.kill_rank(*run.held("step", 0))


def cuts_power(place: str, rank: int = 1) -> Callable[[Disturbed], None]:
    def act(run: Disturbed) -> None:
        node, _ = run.held(place, rank)
        run.cluster.kill_node(node)

    return act


def kills_slurmd_for_a_while(run: Disturbed) -> None:
    node, _ = run.held("step")
    run.cluster.kill_slurmd(node)
    time.sleep(2)
    run.cluster.start_slurmd(node)
    run.release("step")


def kills_slurmd(run: Disturbed) -> None:
    node, _ = run.held("step")
    run.cluster.kill_slurmd(node)
    # Slurm takes the node for dead, and the job from it.
    run.cluster.wait(run.job, "PENDING", timeout=120)


def restarts_controller(run: Disturbed) -> None:
    run.held("step")
    run.cluster.restart_controller()
    run.release("step")


def takes_controller_away(run: Disturbed) -> None:
    node, pid = run.held("step")
    run.cluster.kill_controller()
    run.kill_rank(node, pid)
    run.says("requeueing failed")
    run.cluster.start_controller()


def drains_and_requeues(run: Disturbed) -> None:
    node, _ = run.held("step")
    run.cluster.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    run.cluster.run("scontrol", "requeue", run.job)


def preempts(place: str) -> Callable[[Disturbed], None]:
    def act(run: Disturbed) -> None:
        run.held(place)
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
    node, process = run.held("step")
    with run.cluster.share_full():
        run.release("step")
        # Its words may find no room in the job's log, which lies there too.
        there = ("test", "-e", f"/proc/{process}")
        run.until("failing", lambda: run.cluster.on(node, *there).returncode)
        # What was saved before is whole, and stays so.
        assert whole_checkpoints(run.run / "checkpoints")
        time.sleep(10)


def is_gone(run: Disturbed) -> None:
    run.held("step")
    with run.cluster.share_gone():
        run.release("step")
        time.sleep(15)


def stops_a_rank(run: Disturbed) -> None:
    run.kill_rank(*run.held("step"), "STOP")
    run.release("step")


def waits_for_stacks(run: Disturbed) -> None:
    stacks = run.run / "logs/stacks-rank-00001.txt"
    run.until("showing where it hangs", lambda: stacks.exists() and "in hold" in stacks.read_text())


def waits_for_the_limit(run: Disturbed) -> None:
    run.held("step")


# ---- the table

MID_STEP = fault("step", 10)
TORCHRUN = "torchrun"
PREEMPTED = ("cluster.partition=low",)
TERM = "SlurmctldParameters=enable_configless\n"

CASES = [
    Case("kill -9", "rank 1 is killed", kills_a_rank, faults=(MID_STEP,), causes=("",)),
    Case(
        "kill -9 of rank 0",
        "rank 0 is killed",
        kills_rank_0,
        "fsdp",
        TORCHRUN,
        faults=(fault("step", 10, 0),),
        causes=("",),
    ),
    Case(
        "raises",
        "rank 1 raises once",
        nothing,
        "fsdp_tp",
        faults=(fault("step", 10, do="raise"),),
        causes=(LATIN,),
    ),
    Case(
        "raises under torchrun",
        "rank 1 raises once",
        nothing,
        "fsdp_ep",
        TORCHRUN,
        faults=(fault("step", 10, do="raise"),),
        causes=(LATIN,),
    ),
    Case(
        "power, mid-step",
        "the second node loses power in a step",
        cuts_power("step"),
        causes=None,
        faults=(MID_STEP,),
    ),
    Case(
        "power, mid-save",
        "the second node loses power in a save",
        cuts_power("save"),
        "fsdp",
        causes=None,
        faults=(fault("save", 8),),
    ),
    Case(
        "power of the batch host",
        "the first node, with the job's script, loses power in a step",
        cuts_power("step", 0),
        "fsdp",
        TORCHRUN,
        causes=None,
        faults=(fault("step", 10, 0),),
    ),
    Case(
        "slurmd for a while",
        "slurmd of a node dies and comes back",
        kills_slurmd_for_a_while,
        faults=(MID_STEP,),
        restarts=0,
    ),
    Case(
        "slurmd for good",
        "slurmd of a node dies and stays away",
        kills_slurmd,
        "fsdp",
        causes=None,
        faults=(MID_STEP,),
    ),
    Case(
        "controller restarts",
        "the controller restarts in a step",
        restarts_controller,
        "deepspeed_1",
        faults=(MID_STEP,),
        restarts=0,
    ),
    Case(
        "controller away",
        "a rank is killed while the controller is away",
        takes_controller_away,
        faults=(MID_STEP,),
        causes=("",),
    ),
    Case(
        "other nodes",
        "a node is drained and the job requeued by hand",
        drains_and_requeues,
        "hsdp",
        faults=(MID_STEP,),
    ),
    Case(
        "hang",
        "rank 1 waits for ever in a step",
        waits_for_stacks,
        "fsdp_ep",
        faults=(MID_STEP,),
        lines=("strategy.timeout=15",),
        causes=("rank 1 on node",),
    ),
    Case(
        "stopped process",
        "rank 1 is stopped (SIGSTOP) in a step",
        stops_a_rank,
        faults=(MID_STEP,),
        lines=("strategy.timeout=15",),
        causes=("rank 1 on node",),
    ),
    Case(
        "stopped process under torchrun",
        "rank 1 is stopped (SIGSTOP) in a step",
        stops_a_rank,
        "fsdp_tp",
        TORCHRUN,
        faults=(MID_STEP,),
        lines=("strategy.timeout=15",),
        causes=("rank 1 on node",),
    ),
    Case(
        "restart loop",
        "rank 1 raises at the same step at each start",
        nothing,
        # Before the first checkpoint: one that comes in between would be progress.
        faults=(fault("step", 2, do="raise", always=True),),
        restarts=2,
        causes=(LATIN,) * 3,
        ends="FAILED",
    ),
    Case(
        "crash loop of rank 0",
        "rank 0, which tells how a run ended, is killed at each start",
        nothing,
        "fsdp",
        faults=(fault("step", 2, 0, "kill", always=True),),
        restarts=2,
        causes=("",) * 3,
        ends="FAILED",
    ),
    Case(
        "preempted mid-step",
        "USR1 by preemption in a step",
        preempts("step"),
        faults=(MID_STEP,),
        job=PREEMPTED,
    ),
    Case(
        "preempted mid-step, TERM",
        "TERM by preemption in a step",
        preempts("step"),
        "fsdp",
        faults=(MID_STEP,),
        job=PREEMPTED,
        conf=TERM,
    ),
    Case(
        "preempted mid-save",
        "USR1 by preemption in a save",
        preempts("save"),
        "hsdp",
        faults=(fault("save", 8),),
        job=PREEMPTED,
    ),
    Case(
        "preempted in imports",
        "USR1 by preemption in imports",
        preempts("imports"),
        "deepspeed_3",
        faults=(fault("imports"),),
        job=PREEMPTED,
    ),
    Case(
        "preempted before imports",
        "TERM by preemption before Python has run a line",
        preempts("start"),
        faults=(fault("start"),),
        job=PREEMPTED,
        conf=TERM,
    ),
    Case(
        "preempted in evaluation",
        "USR1 by preemption in an evaluation",
        preempts("evaluation"),
        "fsdp_tp",
        faults=(fault("evaluation"),),
        job=PREEMPTED,
    ),
    Case(
        "preempted under torchrun",
        "USR1 by preemption in a step",
        preempts("step"),
        "fsdp_ep",
        TORCHRUN,
        faults=(MID_STEP,),
        job=PREEMPTED,
    ),
    Case(
        "preempted in imports under torchrun",
        "TERM by preemption in imports",
        preempts("imports"),
        "fsdp",
        TORCHRUN,
        faults=(fault("imports"),),
        job=PREEMPTED,
        conf=TERM,
    ),
    Case(
        "preempted mid-step, DeepSpeed",
        "USR1 by preemption in a step",
        preempts("step"),
        "deepspeed_2",
        TORCHRUN,
        faults=(MID_STEP,),
        job=PREEMPTED,
    ),
    Case(
        "array preempted",
        "USR1 by preemption in a step of both tasks",
        preempts("step"),
        "fsdp_cp",
        faults=(MID_STEP,),
        job=(*PREEMPTED, "nodes=1", "processes_per_node=2"),
        tasks=("a", "b"),
    ),
    Case(
        "array preempted, TERM",
        "TERM by preemption in a step of both tasks",
        preempts("step"),
        "fsdp",
        TORCHRUN,
        faults=(MID_STEP,),
        job=(*PREEMPTED, "nodes=1", "processes_per_node=2"),
        tasks=("a", "b"),
        conf=TERM,
    ),
    Case(
        "no grace",
        "preempted, and killed before it can save",
        preempts("step"),
        "deepspeed_1",
        faults=(fault("step", 10, deaf=True),),
        conf="PartitionName=hard Nodes=ALL PriorityTier=1 GraceTime=0 MaxTime=INFINITE\n",
        job=("cluster.partition=hard",),
    ),
    Case(
        "time limit",
        "USR1 before the time limit",
        waits_for_the_limit,
        faults=(MID_STEP,),
        # Slurm is up to a minute early.
        job=("time=3", "cluster.lead=60"),
        lines=("strategy.timeout=200",),
    ),
    Case(
        "slow disk",
        "the shared file system stands still for most of 12 s",
        is_slow,
        "fsdp",
        faults=(fault("step", 0, None, "slow", seconds=0.3, always=True),),
        restarts=0,
        share_mb=96,
    ),
    Case(
        "full disk",
        "the shared file system is full",
        is_full,
        faults=(MID_STEP,),
        restarts=None,
        causes=None,
        share_mb=96,
    ),
    Case(
        "lost mount",
        "the shared file system is away for 15 s",
        is_gone,
        faults=(MID_STEP,),
        restarts=None,
        causes=None,
        share_mb=96,
    ),
]
