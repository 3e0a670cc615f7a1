"""Which candidates continued after each rung, written before the next rung starts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modtrain.common.atomic_io import write_text
from modtrain.common.errors import CheckpointError, OtherRunError
from modtrain.experiments.pattern_search.candidates import Candidate
from modtrain.experiments.pattern_search.selection import Point, select, sort_fronts

RUNGS = "rungs.json"


@dataclass(frozen=True)
class Decision:
    """The end of a rung.

    keep: share that continued. points: of each candidate, loss and forward FLOPs a token. failed:
    why a candidate has none. fronts: by non-dominated sorting. survivors: in the search's order.
    """

    budget: float
    keep: float
    points: dict[str, Point]
    failed: dict[str, str] = field(default_factory=dict)
    fronts: list[list[str]] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)


def decide(
    budget: float, keep: float, points: Mapping[str, Point], failed: Mapping[str, str]
) -> Decision:
    """Return which candidates continue; a function of its arguments alone, whatever their order."""
    ordered = {name: points[name] for name in sorted(points)}
    survivors = sorted(select(ordered, num_survivors(keep, len(ordered))))
    return Decision(
        budget, keep, ordered, dict(sorted(failed.items())), sort_fronts(ordered), survivors
    )


def num_survivors(keep: float, count: int) -> int:
    """Return how many of ``count`` candidates continue: at least one."""
    # Against rounding: 0.1 x 30 is 3.0000000000000004 in floating point.
    return max(1, math.ceil(keep * count * (1 - 1e-12)))


class DecisionLog:
    """The decisions of a search in ``rungs.json``.

    candidates: of the first rung, all of them.

    Raises:
        OtherRunError: the file is of a search with other candidates, budgets or ``keep``.
        CheckpointError: the file cannot be read.
    """

    def __init__(
        self, path: Path, candidates: Sequence[Candidate], budgets: Sequence[float], keep: float
    ) -> None:
        self.path, self.candidates = path, candidates
        self.decisions = self._read()
        differing = self._differences(budgets, keep)
        if differing:
            raise OtherRunError(
                "\n".join([f"{path} has decisions of another search:", *differing])
                + "\nremedy: take the changes back, or give another name="
            )

    def write(self, decision: Decision) -> None:
        """Add the decision of the next rung."""
        self.decisions.append(decision)
        content = {
            "objectives": ["held_out/causal_loss", "forward_flops_per_token"],
            "candidates": self._listed(),
            "rungs": [asdict(decision) for decision in self.decisions],
        }
        write_text(self.path, json.dumps(content, indent=1) + "\n")

    def _listed(self) -> dict[str, Any]:
        return {
            c.name: {"origin": c.origin, "capacities": list(c.capacities)} for c in self.candidates
        }

    def _read(self) -> list[Decision]:
        self._stored: dict[str, Any] = {}
        if not self.path.is_file():
            return []
        try:
            content = json.loads(self.path.read_text())
            self._stored = content["candidates"]
            return [
                Decision(**{**rung, "points": {n: (p[0], p[1]) for n, p in rung["points"].items()}})
                for rung in content["rungs"]
            ]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            remedy = "remove it: the rungs are decided again from the runs"
            raise CheckpointError(f"{self.path} cannot be read: {error}; {remedy}") from None

    def _differences(self, budgets: Sequence[float], keep: float) -> list[str]:
        if not self.decisions:
            return []
        now, then = self._listed(), self._stored
        lines = [
            f"  {name}: {then.get(name)} then, {now.get(name)} now"
            for name in sorted(now.keys() | then.keys())
            if now.get(name) != then.get(name)
        ]
        # A later budget may be added: the search continues.
        for number, decision in enumerate(self.decisions):
            budget = budgets[number] if number < len(budgets) else None
            if budget != decision.budget:
                lines.append(f"  budgets: rung {number} had {decision.budget:g}, now {budget}")
            if keep != decision.keep:
                lines.append(f"  keep: {decision.keep:g} at rung {number}, {keep:g} now")
        return lines
