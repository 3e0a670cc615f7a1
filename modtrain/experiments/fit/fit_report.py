"""A fit as JSON, as tables and as files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table

from modtrain.common.atomic_io import file_sha256, without_nan, write_bytes, write_text
from modtrain.experiments.fit.bootstrap import Estimate
from modtrain.experiments.fit.figures import frontier_figure, loss_figure, residual_figure
from modtrain.experiments.fit.parabolas import Parabola
from modtrain.experiments.fit.results import FamilyFit, Fit, Optimum, Refusal
from modtrain.experiments.fit.sensitivity import Range

JSON = "fit.json"
_FORMAT = "modtrain fit 1"
# What a screen has room for; where points share budgets by chance there are dozens.
_MOST_ROWS = 12
_MOST_REFUSALS = 4
_NOT_COUNTED = "not stated (parameters=)"


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def write(fit: Fit, directory: Path) -> list[Path]:
    """Write ``fit.json`` and each figure as SVG and PNG into ``directory``; return the paths.

    ``fit.json`` is the last: where it is, the figures are those of the same fit.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / JSON
    path.unlink(missing_ok=True)
    figures = {
        "loss_over_parameters": loss_figure(fit),
        "optimum_over_flops": frontier_figure(fit),
        "residuals": residual_figure(fit),
    }
    paths = []
    for name, figure in figures.items():
        for picture in (directory / f"{name}.svg", directory / f"{name}.png"):
            if figure is None:
                # Of an earlier fit.
                picture.unlink(missing_ok=True)
            else:
                paths.append(_save(figure, picture))
    write_text(path, json.dumps(to_json(fit), indent=1, allow_nan=False) + "\n")
    return [path, *paths]


def _save(figure: Figure, path: Path) -> Path:
    content = io.BytesIO()
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with rc_context({"svg.hashsalt": "modtrain"}):
        figure.savefig(content, format=path.suffix[1:], dpi=130, metadata=metadata)
    write_bytes(path, content.getvalue(), path.parent)
    return path


def to_json(fit: Fit) -> dict[str, Any]:
    """Return the fit as plain values, without NaN: a number that is not finite is None."""
    config = fit.config
    points = Path(config.points) if config.points else None
    is_file = points is not None and points.is_file()
    content = {
        "format": _FORMAT,
        "law": "L = E + A / N^alpha + B / D^beta",
        "parameters": config.parameters,
        "derived": f"{fit.derived} by C = 6ND" if fit.derived else None,
        "points_sha256": file_sha256(points) if points and is_file else None,
        "settings": asdict(config),
        "families": {name: _family(family) for name, family in fit.families.items()},
        "speed_ups": [asdict(speed_up) for speed_up in fit.speed_ups],
        "warnings": fit.warnings,
        "refusals": [asdict(refusal) for refusal in fit.refusals],
    }
    return {key: without_nan(value) for key, value in content.items()}


def _family(family: FamilyFit) -> dict[str, Any]:
    points, rule = family.points, family.frontier.rule
    residual_P = np.log(family.fit.law.loss(points.N_P, points.D_P) / points.loss_P)
    return {
        "num_points": len(points),
        "num_left_out": family.num_left_out,
        "law": {name: asdict(estimate) for name, estimate in family.law.items()},
        "check": {name: asdict(estimate) for name, estimate in family.check.items()},
        "exponents": {name: asdict(estimate) for name, estimate in family.exponents.items()},
        "objective": family.fit.minimum.objective,
        "num_starts": family.fit.num_starts,
        "num_starts_agreeing": family.fit.num_agreeing,
        "undetermined": family.fit.undetermined,
        "flops_rule": asdict(rule),
        "budgets": [asdict(optimum) for optimum in family.optima],
        "parabolas": {
            "is_biased": True,
            "exponent_N": _or_none(family.parabola_exponent),
            "budgets": [_parabola(parabola) for parabola in family.parabolas],
        },
        "sensitivity": {
            "leave_one_point_out": _ranges(family.sensitivity.by_point, "row"),
            "leave_one_budget_out": _ranges(family.sensitivity.by_budget, "C"),
        },
        "points": {
            "row": list(points.rows),
            "N": points.N_P.tolist(),
            "D": points.D_P.tolist(),
            "C": points.C_P.tolist(),
            "loss": points.loss_P.tolist(),
            "residual": residual_P.tolist(),
        },
    }


def _parabola(parabola: Parabola) -> dict[str, Any]:
    return {
        "C": parabola.C,
        "num_points": parabola.num_points,
        "coefficients": list(parabola.coefficients),
        "log_N_centre": parabola.centre,
        "N": asdict(parabola.N),
        "loss": asdict(parabola.loss),
        "share_interior": parabola.share_interior,
    }


def _or_none(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else asdict(estimate)


def _ranges(ranges: dict[str, Range], label: str) -> dict[str, Any]:
    return {
        name: {
            "low": span.low,
            "high": span.high,
            f"{label}_left_out_at_low": span.at_low,
            f"{label}_left_out_at_high": span.at_high,
        }
        for name, span in ranges.items()
    }


def show(fit: Fit, console: Console) -> None:
    """Print the law, the optima and the speed-ups as tables; below what has to be known."""
    for family in fit.families.values():
        console.print(_law_table(family, fit.config.level))
        if family.optima:
            console.print(_optima_table(family))
    if fit.speed_ups:
        console.print(_speed_up_table(fit))
    for line in _notes(fit):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _law_table(family: FamilyFit, level: float) -> Table:
    left_out = f", {family.num_left_out} left out" if family.num_left_out else ""
    points = f"{len(family.points)} points{left_out}"
    columns = ["value", f"{level:.0%} interval", "variable projection", "one point out"]
    headings = [Column(name, justify="right") for name in [*columns, "one budget out"]]
    title = f"{family.name}: L = E + A/N^alpha + B/D^beta ({points})"
    table = Table(Column(""), *headings, title=title)
    rows: dict[str, tuple[str, Estimate, Estimate | None]] = {
        name: (name, family.law[name], family.check[name])
        for name in ("E", "A", "B", "alpha", "beta")
    }
    for name, label in (("N", "N* ~ C^"), ("D", "D* ~ C^")):
        if name in family.exponents:
            rows[f"exponent_{name}"] = (label, family.exponents[name], None)
    for name, (label, estimate, check) in rows.items():
        ranges = family.sensitivity.by_point.get(name), family.sensitivity.by_budget.get(name)
        cells = [_number(check.value) if check else "", *map(_range, ranges)]
        table.add_row(label, _number(estimate.value), _interval(estimate), *cells)
    return table


def _optima_table(family: FamilyFit) -> Table:
    names = ["C", "points", "N*", "D*", "L*", "N* of a parabola"]
    columns = [Column(name, justify="right") for name in names]
    title = f"{family.name}: optimum at each budget, with its interval"
    table = Table(*columns, title=title, show_lines=True)
    by_parabola = {parabola.C: parabola.N for parabola in family.parabolas}
    shown = _spread(family.optima)
    for best in shown:
        cells = [f"{best.C:.3g}", "extrapolated" if best.is_extrapolated else str(best.num_points)]
        estimates = [best.N, best.D, best.loss, by_parabola.get(best.C)]
        table.add_row(*cells, *map(_stacked, estimates))
    table.caption = "parabolas are biased (arXiv 2603.22339): the law is the result"
    if len(shown) < len(family.optima):
        table.caption += f"\n{len(shown)} of {len(family.optima)} budgets: {JSON} has all"
    return table


def _speed_up_table(fit: Fit) -> Table:
    baseline = fit.config.baseline
    title = f"effective speed-up: FLOPs that {baseline} needs for the same loss, over the family's"
    names = ["C", "L*", "factor", f"{fit.config.level:.0%} interval", "baseline"]
    columns = [Column(name, justify="right") for name in names]
    table = Table(Column("family"), *columns, title=title)
    for row in fit.speed_ups:
        factor = "out of reach" if row.factor.value is None else _number(row.factor.value)
        where = "extrapolated" if row.is_extrapolated else "measured"
        cells = f"{row.C:.3g}", _number(row.loss), factor, _interval(row.factor), where
        table.add_row(row.family, *cells)
    return table


def _notes(fit: Fit) -> Iterator[str]:
    yield f"parameters counted by N: {fit.config.parameters or _NOT_COUNTED}"
    if fit.derived:
        yield f"{fit.derived} is by C = 6ND: the points give the other two alone"
    yield from (f"warning: {text}" for text in fit.warnings)
    by_part: dict[tuple[str, str], list[Refusal]] = {}
    for refusal in fit.refusals:
        by_part.setdefault((refusal.family, refusal.part), []).append(refusal)
    for (family, part), refusals in by_part.items():
        for refusal in refusals[:_MOST_REFUSALS]:
            where = "" if refusal.C is None else f" at {refusal.C:.3g} FLOPs"
            yield f"no {part} of {family}{where}: {refusal.reason}"
        if (more := len(refusals) - _MOST_REFUSALS) > 0:
            yield f"no {part} of {family} at {more} more budgets: {JSON} has the reasons"


def _spread(optima: list[Optimum]) -> list[Optimum]:
    """Return all optima, or as many as a screen has room for, from the first to the last."""
    if len(optima) <= _MOST_ROWS:
        return optima
    return [optima[int(i)] for i in np.linspace(0, len(optima) - 1, _MOST_ROWS).round()]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"
    return f"{value:.2e}"


def _stacked(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{_number(estimate.value)}\n{_interval(estimate)}"


def _interval(estimate: Estimate) -> str:
    if estimate.low is None and estimate.high is None:
        return "-"
    high = "unbounded" if estimate.high is None else _number(estimate.high)
    return f"{_number(estimate.low)} to {high}"


def _range(span: Range | None) -> str:
    return "-" if span is None else f"{_number(span.low)} to {_number(span.high)}"
