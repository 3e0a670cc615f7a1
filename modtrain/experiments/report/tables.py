"""The tables of a report: of runs, comparisons, routers, swaps, laws, and runs left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from modtrain.experiments.report.collect import Collection, LeftOut
from modtrain.experiments.report.comparisons import comparison_rows
from modtrain.experiments.report.files import number, printable
from modtrain.experiments.report.grids import Grid
from modtrain.experiments.report.runs import Run

# Every run has its own.
_IDENTITY = ("name", "runs_dir")
NONE = "-"

_FORMATS: dict[str, Callable[[float], str]] = {
    "loss": "{:.4f}".format,
    "count": lambda value: f"{value:,.0f}",
    "flops": "{:.4g}".format,
    "number": "{:.4g}".format,
    "change": "{:+.2%}".format,
    "seconds": "{:.4g}".format,
}


@dataclass(frozen=True)
class Column:
    """A column. kind: ``text``, ``value`` (of a configuration), or how its numbers are shown.

    is_shown: False for what only the files have.
    """

    key: str
    title: str
    kind: str = "text"
    is_shown: bool = True

    @property
    def is_number(self) -> bool:
        """Whether its values are numbers."""
        return self.kind in _FORMATS

    def show(self, value: Any) -> str:
        """Return a value as text."""
        if value is None:
            return NONE if self.is_number else "null" if self.kind == "value" else ""
        if self.is_number:
            return _FORMATS[self.kind](value)
        if self.kind == "value" and isinstance(value, float):
            return f"{value:g}"
        return str(value)


@dataclass(frozen=True)
class Table:
    """A table. name: of its files. rows: plain values by column's key, without NaN."""

    name: str
    title: str
    columns: list[Column]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def shown(self) -> list[Column]:
        """The columns of the page."""
        return [column for column in self.columns if column.is_shown]


def make_tables(collection: Collection, directories: Mapping[str, str]) -> list[Table]:
    """Return the tables that have rows.

    directories: of each run, by its name, relative to the report.
    """
    tables = [
        runs_table(collection, directories),
        _comparisons_table(collection),
        _routers_table(collection.runs),
        _swaps_table(collection.runs),
        _laws_table(collection),
        _optima_table(collection),
        _speed_ups_table(collection),
        _costs_table(collection.runs),
        left_out_table(collection.left_out),
    ]
    return [table for table in tables if table.rows]


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Return the configuration keys on which the runs do not agree."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [
        key
        for key in keys
        if key not in _IDENTITY and len({_canonical(run.config.get(key)) for run in runs}) > 1
    ]


def runs_table(collection: Collection, directories: Mapping[str, str]) -> Table:
    """Return a row for each run: what differs in its configuration, and what came of it."""
    runs = collection.runs
    keys = differing_keys(runs)
    columns = [
        Column("run", "run"),
        Column("data", "data", is_shown=len(collection.groups) > 1),
        Column("state", "state"),
        *(Column(f"config.{key}", key, "value") for key in keys),
        Column("loss", "causal loss (nats a token)", "loss"),
        Column("flops", "training FLOPs", "flops"),
        Column("tokens", "tokens", "count"),
        Column("steps", "steps", "count"),
        Column("causal_forward_flops", "forward FLOPs a token, causal", "count"),
        Column("forward_flops", "forward FLOPs a token, as trained", "count"),
        Column("step_seconds", "step time (s)", "seconds"),
        Column("training_seconds", "training time (s)", "seconds"),
        Column("machine", "machine", is_shown=len({run.machine for run in runs}) > 1),
        Column("notes", "notes", is_shown=any(run.notes for run in runs)),
        Column("directory", "directory", is_shown=False),
        Column("command", "command", is_shown=False),
    ]
    return Table("runs", "Runs", columns, [_run_row(run, keys, directories) for run in runs])


def _run_row(run: Run, keys: Sequence[str], directories: Mapping[str, str]) -> dict[str, Any]:
    return {
        "run": run.name,
        "data": run.data,
        "state": run.state,
        **{f"config.{key}": plain(run.config.get(key)) for key in keys},
        "loss": run.loss,
        "flops": run.flops,
        "tokens": int(run.tokens),
        "steps": int(run.step),
        "causal_forward_flops": run.causal_forward_flops,
        "forward_flops": run.forward_flops,
        "step_seconds": run.metrics.step_seconds,
        "training_seconds": run.metrics.seconds,
        "machine": run.machine,
        "notes": "; ".join(run.notes),
        "directory": printable(directories[run.name]),
        "command": run.command,
    }


def _comparisons_table(collection: Collection) -> Table:
    columns = [
        Column("comparison", "comparison"),
        Column("arm", "arm"),
        Column("seeds", "seeds", "count"),
        Column("loss", "causal loss (nats a token)", "loss"),
        Column("loss_spread", "spread", "loss"),
        Column("flops", "training FLOPs", "flops"),
        Column("forward_flops", "forward FLOPs a token, as trained", "count"),
        Column("control", "control: its unrouted layers alone"),
        *_change_columns("control", "loss over the control's"),
        Column("best_dense", "best dense arm"),
        *_change_columns("best_dense", "loss over the best dense arm's"),
    ]
    rows = [
        row
        for group in collection.groups
        for name, report in group.comparisons.items()
        for row in comparison_rows(name, report)
    ]
    return Table("comparisons", "Comparisons", columns, rows)


def _change_columns(key: str, title: str) -> list[Column]:
    ends = (("", title), ("_low", "from"), ("_high", "to"))
    return [Column(f"change_over_{key}{end}", shown, "change") for end, shown in ends]


def _costs_table(runs: Sequence[Run]) -> Table:
    """Return what each run took, of those that have a record of it."""
    columns = [
        Column("run", "run"),
        Column("device", "hours of"),
        Column("hours", "hours", "number"),
        Column("training_hours", "in steps", "number"),
        Column("repeated_hours", "of steps made again", "number"),
        Column("repeated_steps", "steps made again", "count"),
        Column("queue_hours", "hours in the queue", "number"),
        Column("mfu", "MFU in steps", "number"),
        Column("mfu_of_all", "MFU of all hours", "number"),
        Column("starts", "starts", "count"),
        Column("restarts", "restarts by cause"),
        Column("unknown", "unknown", is_shown=any(run.cost and run.cost.unknown for run in runs)),
    ]
    return Table("costs", "Costs", columns, [_cost_row(run) for run in runs if run.cost])


def _cost_row(run: Run) -> dict[str, Any]:
    cost = asdict(run.cost) if run.cost else {}
    causes = "; ".join(f"{count} by {cause}" for cause, count in cost["restarts"].items())
    names = ("device", "hours", "training_hours", "repeated_hours", "repeated_steps")
    more = ("queue_hours", "mfu", "mfu_of_all", "starts")
    return {
        "run": run.name,
        **{name: cost[name] for name in (*names, *more)},
        "restarts": printable(causes),
        "unknown": printable("; ".join(cost["unknown"])),
    }


def _routers_table(runs: Sequence[Run]) -> Table:
    columns = [
        Column("run", "run"),
        Column("router", "router"),
        Column("gate_mean", "mean gate", "number"),
        Column("update_ratio", "update over stream", "number"),
        Column("worth", "loss without it", "change"),
    ]
    rows = []
    for run in runs:
        histories = run.metrics.routers
        for label in sorted({*histories, *run.worth}):
            history = histories.get(label)
            gate, update = (history.gate[-1], history.update[-1]) if history else (None, None)
            health = {"gate_mean": number(gate), "update_ratio": number(update)}
            worth = run.worth.get(label)
            rows.append({"run": run.name, "router": label, **health, "worth": worth})
        if run.routed_worth is not None:
            empty = {"gate_mean": None, "update_ratio": None}
            rows.append({"run": run.name, "router": "all", **empty, "worth": run.routed_worth})
    return Table("routers", "Routers at the end of training", columns, rows)


def _swaps_table(runs: Sequence[Run]) -> Table:
    columns = [
        Column("run", "run"),
        Column("choice", "choice"),
        Column("gate", "gate"),
        Column("router", "router"),
        Column("loss", "causal loss (nats a token)", "loss"),
        Column("change", "change", "change"),
        Column("low", "from", "change"),
        Column("high", "to", "change"),
    ]
    rows = [{"run": run.name, **vars(swap)} for run in runs for swap in run.swaps]
    title = "Loss under other choices of tokens (95% interval over sequences)"
    return Table("swaps", title, columns, rows)


def _grids(collection: Collection) -> list[Grid]:
    return [grid for group in collection.groups for grid in group.grids]


def _laws_table(collection: Collection) -> Table:
    columns = [
        Column("grid", "grid"),
        Column("family", "family"),
        Column("parameters", "N counts"),
        Column("points", "points", "count"),
        Column("quantity", "quantity"),
        *(Column(key, key, "number") for key in ("value", "low", "high")),
    ]
    rows = []
    for grid in _grids(collection):
        for family in grid.fit.families.values() if grid.fit else ():
            exponents = {f"exponent of {name}*": e for name, e in family.exponents.items()}
            for name, estimate in {**family.law, **exponents}.items():
                head = {"grid": grid.name, "family": family.name, "parameters": grid.parameters}
                count = {"points": len(family.points), "quantity": name}
                rows.append({**head, **count, **vars(estimate)})
    title = "Scaling laws: L = E + A/N^alpha + B/D^beta, with 90% intervals"
    return Table("laws", title, columns, rows)


def _optima_table(collection: Collection) -> Table:
    names = {"N": "N*", "D": "D*", "loss": "L*"}
    columns = [
        Column("grid", "grid"),
        Column("family", "family"),
        Column("C", "training FLOPs", "flops"),
        *(
            Column(f"{key}{end}", f"{title}{suffix}", "loss" if key == "loss" else "number")
            for key, title in names.items()
            for end, suffix in (("", ""), ("_low", " from"), ("_high", " to"))
        ),
    ]
    rows = []
    for grid in _grids(collection):
        for family in grid.fit.families.values() if grid.fit else ():
            for optimum in family.optima:
                row = {"grid": grid.name, "family": family.name, "C": optimum.C}
                for key in names:
                    estimate = getattr(optimum, key)
                    ends = {f"{key}_low": estimate.low, f"{key}_high": estimate.high}
                    row |= {key: estimate.value, **ends}
                rows.append(row)
    return Table("optima", "Optimum of each budget by the law", columns, rows)


def _speed_ups_table(collection: Collection) -> Table:
    columns = [
        Column("grid", "grid"),
        Column("family", "family"),
        Column("baseline", "over"),
        Column("C", "training FLOPs", "flops"),
        Column("factor", "factor", "number"),
        Column("low", "from", "number"),
        Column("high", "to", "number"),
        Column("is_extrapolated", "extrapolated"),
    ]
    rows = []
    for grid in _grids(collection):
        for speed_up in grid.fit.speed_ups if grid.fit else ():
            head = {"grid": grid.name, "family": speed_up.family, "C": speed_up.C}
            row = {**head, "baseline": grid.fit.config.baseline if grid.fit else None}
            factor = {"factor": speed_up.factor.value, "low": speed_up.factor.low}
            end = {"high": speed_up.factor.high, "is_extrapolated": speed_up.is_extrapolated}
            rows.append({**row, **factor, **end})
    title = "Effective speed-up: FLOPs that the baseline needs for the same loss, over the family's"
    return Table("speed_ups", title, columns, rows)


def left_out_table(left_out: Sequence[LeftOut]) -> Table:
    """Return a row for each run that is not reported."""
    columns = [Column("run", "run"), Column("reason", "why")]
    return Table(
        "left_out",
        "Runs left out",
        columns,
        [{"run": run.name, "reason": run.reason} for run in left_out],
    )


def plain(value: Any) -> Any:
    """Return a value of a configuration as one that strict JSON has."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    return str(value)


def _canonical(value: Any) -> str:
    """Return equal text for equal values: 1 and 1.0, but not 1 and true."""
    as_number = number(value)
    return repr(value) if as_number is None else repr(as_number)
