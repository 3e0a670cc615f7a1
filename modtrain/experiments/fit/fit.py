"""`modtrain fit`, and the same on points in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

from modtrain.common.errors import DataError, raise_if_any
from modtrain.common.terminal import last_output, plain_console
from modtrain.experiments.fit.config import LEAST_SIZES, FitConfig
from modtrain.experiments.fit.family import FamilyFitter
from modtrain.experiments.fit.fit_report import show, write
from modtrain.experiments.fit.points import Points, read_points
from modtrain.experiments.fit.results import Fit, Refusal
from modtrain.experiments.fit.speed_up import speed_ups


def fit(config: FitConfig, console: Console | None = None) -> None:
    """Fit the points of a file, print the result and write ``fit.json`` and the figures.

    Raises:
        ConfigError, DataError: the configuration or the file cannot be used.
    """
    raise_if_any(config.problems())
    result = fit_points(read_points(Path(str(config.points)), config), config)
    console = console or plain_console()
    paths = list(write(result, Path(str(config.output))))
    with last_output():
        show(result, console)
        for path in paths:
            console.print(f"wrote {path}", soft_wrap=True, highlight=False)


# Under a resample's law that is hardly determined, powers may overflow.
@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def fit_points(points: Points, config: FitConfig) -> Fit:
    """Fit the law to each family of ``points``.

    What cannot be fitted is in ``refusals`` with its reason, and does not end the rest.

    Raises:
        ConfigError: ``config`` cannot be.
        DataError: a chosen family is not there, or none has enough points.
    """
    raise_if_any(config.problems(needs_files=False))
    result = Fit(config, points.derived)
    for name, chosen in _chosen_families(points, config).items():
        kept = chosen.without_highest(config.drop_highest_losses)
        if reason := _too_few(kept, config):
            result.refusals.append(Refusal(name, "law", reason))
        else:
            result.families[name] = FamilyFitter(name, kept, len(chosen) - len(kept), result).fit()
    if not result.families:
        reasons = "\n".join(f"  - {r.family}: {r.reason}" for r in result.refusals)
        raise DataError(f"no family of points can be fitted:\n{reasons}")
    _add_speed_ups(result)
    return result


def _chosen_families(points: Points, config: FitConfig) -> dict[str, Points]:
    families = points.by_family()
    if unknown := [name for name in config.families if name not in families]:
        there = ", ".join(families)
        raise DataError(
            f"families={unknown}: no point is of {', '.join(unknown)}\n"
            f"    remedy: the points' families are {there}, upper and lower case as they are"
        )
    chosen = config.families or list(families)
    return {name: families[name] for name in chosen}


def _too_few(points: Points, config: FitConfig) -> str:
    """Return why a law cannot be fitted to the points; empty if it can."""
    if len(points) < config.min_points:
        less = f" after the highest {n} losses" if (n := config.drop_highest_losses) else ""
        return (
            f"has {len(points)} points{less}, and min_points is {config.min_points}: train more"
            " sizes or budgets"
        )
    for name, values in (("N", points.N_P), ("D", points.D_P)):
        if (num := len(np.unique(values))) < LEAST_SIZES:
            return f"number of different {name}: {num}, and the law needs {LEAST_SIZES}"
    return ""


def _add_speed_ups(result: Fit) -> None:
    """Add each family's effective speed-up over the baseline, where there are both."""
    baseline = result.families.get(result.config.baseline)
    others = [family for family in result.families.values() if family is not baseline]
    if not others or (baseline is None and len(others) == 1):
        return
    for family in others:
        if baseline is None:
            reason = f"no family {result.config.baseline} was fitted: set baseline="
            result.refusals.append(Refusal(family.name, "effective speed-up", reason))
        elif not baseline.optima or not family.optima:
            reason = "one of the two has no optimum"
            result.refusals.append(Refusal(family.name, "effective speed-up", reason))
        else:
            budgets = [optimum.C for optimum in family.optima]
            C_range = float(baseline.points.C_P.min()), float(baseline.points.C_P.max())
            pair = (baseline.frontier, baseline.frontiers), (family.frontier, family.frontiers)
            factors = speed_ups(family.name, *pair, budgets, C_range, result.config.level)
            result.speed_ups.extend(factors)
