"""`modtrain status cost=true`: what runs took, from their records and Slurm's accounting."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from modtrain.cluster import slurm
from modtrain.cluster.runs import RunRecord
from modtrain.cluster.slurm import Allocation, SlurmError
from modtrain.common.atomic_io import write_text
from modtrain.common.reading import UnreadableError
from modtrain.common.terminal import Column, fitted_table
from modtrain.training.usage import Cost, StartUsage, cost_of_starts, read_usage

COST = "cost.json"
"""The file in a run's directory to which its cost is written."""
_NO_RECORD = "killed, or its node was lost"
_MAX_CAUSE_CHARS = 80
_COLUMNS = (
    Column("run", least=20),
    Column("starts", 5, justify="right"),
    Column("hours", justify="right"),
    Column("of"),
    Column("in steps", 2, justify="right"),
    Column("made again", 3, justify="right"),
    Column("queue", 4, justify="right"),
    Column("MFU", 1, justify="right"),
    Column("restarts", 3, justify="right"),
)


def cost_of(run: RunRecord, allocations: Sequence[Allocation] = ()) -> Cost:
    """Add up what ``run`` took. allocations: what Slurm's accounting has of its jobs.

    What cannot be determined is named in the result.
    """
    unknown: list[str] = []
    try:
        starts = read_usage(run.path)
    except UnreadableError as error:
        starts = []
        unknown.append(str(error))
    cost = cost_of_starts(starts)
    cost.unknown = unknown
    if missing := len(run.starts) - len(starts):
        cost.starts = len(run.starts)
        if missing > 0 and not unknown:
            which = "its starts" if not starts else f"{missing} of its {len(run.starts)} starts"
            unknown.append(f"what {which} used: an earlier version of modtrain made them")
    _take_accounting(cost, allocations)
    cost.restarts = _restarts(run, starts)
    if cost.hours is None:
        unknown.append("the hours: neither the run nor Slurm's accounting has them")
    if cost.queue_hours is None and run.submitted:
        unknown.append("the time in the queue: not recorded, and Slurm's accounting has none")
    if starts and cost.mfu is None:
        unknown.append("the MFU: the peak FLOP/s of the device are not known")
    return cost


def _take_accounting(cost: Cost, allocations: Sequence[Allocation]) -> None:
    """Take hours from Slurm's accounting where it has any: it knows when a killed job ended."""
    begun = [one for one in allocations if one.seconds]
    if not begun:
        return
    by_gpu = any(one.gpus for one in begun)
    cost.device = "GPU" if by_gpu else "core"
    hours = sum(one.seconds * (one.gpus if by_gpu else one.cpus) for one in begun) / 3600
    if cost.hours and cost.mfu_of_all is not None:
        cost.mfu_of_all *= cost.hours / hours
    cost.hours, cost.source = hours, "Slurm's accounting"
    cost.queue_hours = sum(one.queued for one in begun) / 3600


def _restarts(run: RunRecord, starts: Sequence[StartUsage]) -> dict[str, int]:
    """Count the restarts by what ended the start before."""
    causes = []
    for begun, after in pairwise(run.starts):
        # Times have a resolution of one second.
        failure = next((f for f in run.failures if int(begun) <= f.time <= after + 1), None)
        start = next((s for s in starts if begun - 1 <= s.begun < max(after, begun + 1)), None)
        if failure is not None:
            causes.append(_kind_of_cause(failure.cause, failure.node))
        elif start is not None and start.end:
            causes.append(_kind_of_cause(start.end, ""))
        else:
            causes.append(_NO_RECORD)
    return dict(Counter(causes).most_common())


def _kind_of_cause(cause: str, nodes: str) -> str:
    """Return what is the same in a cause that comes again, as the job's script counts it."""
    text = re.sub(r"(rank )\d+ on [^ :]+", r"\1N", " ".join(cause.split()))
    for name in filter(None, nodes.split(",")):
        text = text.replace(name, "NODE")
    text = re.sub(r"\d+", "N", text)
    return text if len(text) <= _MAX_CAUSE_CHARS else f"{text[:_MAX_CAUSE_CHARS]}…"


def allocations_of(runs: Sequence[RunRecord]) -> tuple[dict[str, list[Allocation]], str]:
    """Ask Slurm's accounting once for the training jobs of all runs; raises nothing.

    Returns:
        What it has of each job by its number, and why there is nothing; else empty.
    """
    ids = {job.id for run in runs for job in run.submitted}
    if not ids:
        return {}, ""
    try:
        return slurm.allocations(ids), ""
    except SlurmError as error:
        return {}, f"Slurm's accounting does not answer: {str(error).splitlines()[0]}"


def costs_of(runs: Sequence[RunRecord]) -> tuple[list[Cost], str]:
    """Return the cost of each run, and a note where Slurm's accounting has no say."""
    allocations, note = allocations_of(runs)
    costs = []
    for run in runs:
        own = [one for job in run.job_ids for one in allocations.get(job, [])]
        costs.append(cost_of(run, own))
    return costs, note


def show_costs(runs: Sequence[RunRecord], console: Console) -> None:
    """Print the cost of each run, or of one in detail, and write it to the runs' directories."""
    runs = [run for run in runs if not run.is_group]
    costs, note = costs_of(runs)
    for run, cost in zip(runs, costs, strict=True):
        write_cost(run.path, cost)
    if len(runs) == 1:
        console.print(_detail(runs[0], costs[0]))
        for line in costs[0].unknown:
            console.print(Text(f"unknown: {line}"), soft_wrap=True)
    elif runs:
        console.print(_table(runs, costs, console.width))
        if unknown := sum(bool(cost.unknown) for cost in costs):
            console.print(
                f"the cost of {unknown} run{'s' * (unknown > 1)} is not known in full;"
                " what is missing and why: modtrain status run=NAME cost=true",
                soft_wrap=True,
            )
    if note:
        console.print(Text(note), soft_wrap=True)


def write_cost(folder: Path, cost: Cost) -> None:
    """Write the cost to the run's directory, where that can be written."""
    with suppress(OSError):
        write_text(folder / COST, json.dumps(asdict(cost), indent=1))


def _detail(run: RunRecord, cost: Cost) -> Table:
    table = Table(show_header=False, title=Text(f"{run.path}: cost"), title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    unit = f"{cost.device}-hours"
    repeated = "" if cost.repeated_steps is None else f"{cost.repeated_steps:,} steps"
    if cost.repeated_hours is not None:
        repeated += f", {_number(cost.repeated_hours)} {unit}"
    rows = {
        unit: f"{_number(cost.hours)}, over {cost.starts} starts ({cost.source})"
        if cost.hours is not None
        else "unknown",
        "in training steps": _hours(cost.training_hours, unit),
        "made again": repeated or "unknown",
        "in the queue": _hours(cost.queue_hours, "hours"),
        "MFU in steps": _percent(cost.mfu),
        "MFU of all hours": _percent(cost.mfu_of_all),
        "restarts": str(sum(cost.restarts.values())),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    for cause, count in cost.restarts.items():
        table.add_row("", Text(f"{count} by: {cause}"))
    return table


def _table(runs: Sequence[RunRecord], costs: Sequence[Cost], width: int) -> Table:
    rows = [[run.name, *_cells(cost)] for run, cost in zip(runs, costs, strict=True)]
    devices = sorted({cost.device for cost in costs})
    sums = [total([cost for cost in costs if cost.device == device]) for device in devices]
    rows += [["all", *_cells(cost)] for cost in sums]
    return fitted_table(_COLUMNS, rows, width)


def _cells(cost: Cost) -> list[str]:
    return [
        str(cost.starts),
        _number(cost.hours),
        f"{cost.device}s",
        _number(cost.training_hours),
        _number(cost.repeated_hours),
        _number(cost.queue_hours),
        _percent(cost.mfu),
        str(sum(cost.restarts.values())),
    ]


def total(costs: Sequence[Cost]) -> Cost:
    """Add up costs in the hours of one kind of device; what no run has stays unknown."""
    summed = Cost(sum(cost.starts for cost in costs), costs[0].device if costs else "core")
    for name in ("hours", "training_hours", "repeated_hours", "repeated_steps", "queue_hours"):
        values = [value for cost in costs if (value := getattr(cost, name)) is not None]
        setattr(summed, name, sum(values) if values else None)
    restarts = sum((Counter(cost.restarts) for cost in costs), Counter[str]())
    summed.restarts = dict(restarts.most_common())
    return summed


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _hours(value: float | None, unit: str) -> str:
    return "unknown" if value is None else f"{_number(value)} {unit}"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.1f}%"
