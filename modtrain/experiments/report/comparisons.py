"""Comparisons among the runs: arms beside their control and the best dense arm."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modtrain.common.reading import UnreadableError, read_json
from modtrain.experiments.compare.paired import PairedChange
from modtrain.experiments.compare.verdict import verdict
from modtrain.experiments.report.files import number, printable, read_each
from modtrain.experiments.report.runs import Run

_FILE = "compare.json"


@dataclass(frozen=True)
class _Arm:
    runs: list[str]
    control: str | None
    is_routed: bool
    micro_batch_seconds: float | None


@dataclass(frozen=True)
class ComparedArms:
    """A comparison, as its ``compare.json`` says; losses are those of the runs."""

    name: str
    path: Path
    arms: Mapping[str, _Arm]

    @property
    def series(self) -> dict[str, str]:
        """The name of its arm for each run."""
        return {
            run: printable(f"{self.name}: {name}")
            for name, arm in self.arms.items()
            for run in arm.runs
        }

    def report(self, runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
        """Return the arms that have some of ``runs``, as `modtrain compare` reports them."""
        by_name = {str(r.config.get("name")): r for r in runs if r.path.is_relative_to(self.path)}
        described = {}
        for name, arm in self.arms.items():
            of_arm = [by_name[run] for run in arm.runs if run in by_name]
            if of_arm:
                described[name] = _describe(of_arm, arm)
        return described


def read_comparisons(
    root: Path, directories: Sequence[Path], max_bytes: int
) -> tuple[list[ComparedArms], list[str]]:
    """Return the comparisons in ``directories`` below ``root``, and what is wrong with others."""

    def parse(name: str, directory: Path, path: Path) -> ComparedArms:
        content = read_json(path, max_bytes)
        arms = {printable(arm): _arm(of_arm) for arm, of_arm in content.items()}
        return ComparedArms(name, directory, arms)

    return read_each(root, directories, "comparison", _FILE, parse)


def _arm(content: object) -> _Arm:
    runs = content.get("runs") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(runs, list):
        raise UnreadableError(f"{_FILE} is not a comparison's")
    control = content.get("control")
    return _Arm(
        [run for run in runs if isinstance(run, str)],
        control if isinstance(control, str) else None,
        content.get("is_routed") is True,
        number(content.get("micro_batch_seconds")),
    )


def _describe(runs: list[Run], arm: _Arm) -> dict[str, Any]:
    return {
        "runs": runs,
        "causal_loss": statistics.mean(run.loss for run in runs),
        "causal_loss_spread": statistics.stdev(run.loss for run in runs) if runs[1:] else None,
        "causal_losses": {run.seed: run.loss for run in runs},
        "forward_flops_per_token": runs[0].forward_flops,
        "micro_batch_seconds": arm.micro_batch_seconds,
        "is_routed": arm.is_routed,
        "control": arm.control,
        "flops": runs[0].flops,
    }


def sentences(report: dict[str, dict[str, Any]], margin: float) -> list[str]:
    """Return what the comparison comes to; empty where there is nothing to compare.

    margin: of equivalence, as a share of the loss.
    """
    if len(report) < 2 or not all(arm["forward_flops_per_token"] for arm in report.values()):
        return []
    return verdict(report, margin)


def comparison_rows(name: str, report: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each arm: its losses, and the change over its control and the best dense."""
    dense = [arm for arm in report if not report[arm]["is_routed"]]
    best = min(dense, key=lambda arm: report[arm]["causal_loss"], default=None)
    rows = []
    for arm_name, arm in report.items():
        row = {
            "comparison": name,
            "arm": arm_name,
            "seeds": len(arm["runs"]),
            "loss": arm["causal_loss"],
            "loss_spread": arm["causal_loss_spread"],
            "flops": arm["flops"],
            "forward_flops": arm["forward_flops_per_token"],
        }
        rivals = {"control": arm["control"], "best_dense": best if arm["is_routed"] else None}
        for key, rival in rivals.items():
            is_there = rival in report and rival != arm_name
            row[key] = rival if is_there else None
            row |= _change(key, arm, report[rival] if is_there and rival else None)
        rows.append(row)
    return rows


def _change(key: str, arm: dict[str, Any], rival: dict[str, Any] | None) -> dict[str, Any]:
    """Return the relative change over ``rival``, by the seeds of both, with its 95% interval."""
    change = (
        None if rival is None else PairedChange.of(arm["causal_losses"], rival["causal_losses"])
    )
    low, high = (None, None) if change is None or change.error is None else change.interval()
    name = f"change_over_{key}"
    mean = None if change is None else change.mean
    return {name: mean, f"{name}_low": low, f"{name}_high": high}
