"""The results of a search: of each candidate and rung, of the controls, the front and the best."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modtrain.common.atomic_io import write_text
from modtrain.experiments.pattern_search.config import PatternSearchConfig
from modtrain.experiments.pattern_search.runs import Entry, PlannedRun
from modtrain.experiments.pattern_search.selection import Point, sort_fronts
from modtrain.experiments.sweep.job_process import failure_text, state_of
from modtrain.training.metric_names import CAUSAL_LOSS
from modtrain.training.plan import forward_flops_per_token
from modtrain.training.run_directory import RunDirectory

PATTERNS, PARETO = "patterns.csv", "pareto.json"
_CAUSAL_FLOPS = "held_out/causal_flops_per_token"


@dataclass(frozen=True)
class Outcome:
    """What a complete run came to.

    loss: final, held out, causal, in nats a token. forward_flops: executed, a token, in training.
    causal_flops: the same in the held-out evaluation, under the causal decision.
    """

    run: PlannedRun
    loss: float
    forward_flops: float
    causal_flops: float | None

    @property
    def point(self) -> Point:
        """Both objectives."""
        return self.loss, self.forward_flops


@dataclass
class Results:
    """What is there of a search.

    outcomes: by rung and candidate. missing: why a candidate that reached a rung has none there.
    controls: by name. dense_flops: forward FLOPs a token of the dense model.
    """

    config: PatternSearchConfig
    entries: Mapping[str, Sequence[Entry]]
    dense_flops: float
    outcomes: list[dict[str, Outcome]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    controls: dict[str, Outcome] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether the last rung has results."""
        return len(self.outcomes) == len(self.config.budgets) and bool(self.outcomes[-1])

    @property
    def front(self) -> list[str]:
        """The candidates of the last rung there is that none dominates, by loss."""
        last = self.outcomes[-1] if self.outcomes else {}
        fronts = sort_fronts({name: outcome.point for name, outcome in last.items()})
        return fronts[0] if fronts else []

    @property
    def best(self) -> str | None:
        """The candidate of the last rung that ``best`` chooses."""
        last = self.outcomes[-1] if self.outcomes else {}
        if not last:
            return None
        lowest = min(last, key=lambda name: (last[name].point, name))
        if self.config.best == "lowest_loss":
            return lowest
        limit = last[lowest].loss * (1 + self.config.best_within)
        near = [name for name, outcome in last.items() if outcome.loss <= limit]
        return min(near, key=lambda name: (last[name].forward_flops, last[name].loss, name))

    def flops_spent(self, name: str, rung: int) -> float:
        """Training FLOPs that were executed for a candidate by the end of a rung."""
        return sum(entry.own_flops for entry in self.entries[name][: rung + 1])


def outcome_of(run: PlannedRun) -> Outcome | str:
    """Return what a run came to, or why it has no result."""
    directory = RunDirectory.of(run.config)
    if not directory.is_complete:
        return f"{state_of(directory)} {failure_text(directory)}".rstrip()
    content = directory.read_result()
    loss = content.get(CAUSAL_LOSS)
    if loss is None:
        return "the model has no causal decision, and so no causal loss"
    if not math.isfinite(loss):
        return f"its loss is {loss}"
    return Outcome(run, loss, forward_flops_per_token(run.resolved), content.get(_CAUSAL_FLOPS))


def write_csv(results: Results, path: Path) -> None:
    """Write a line for each candidate and rung, and for each control."""
    last = len(results.outcomes) - 1
    rows = [
        _row(results, name, rung, outcome, rung == last and name in results.front)
        for rung, outcomes in enumerate(results.outcomes)
        for name, outcome in outcomes.items()
    ]
    rows += [_control_row(results, *control) for control in results.controls.items()]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _row(
    results: Results, name: str, rung: int, outcome: Outcome, is_on_front: bool
) -> dict[str, Any]:
    candidate = results.entries[name][rung].candidate
    return {
        "candidate": name,
        "origin": candidate.origin,
        "capacities": " ".join(map(repr, candidate.capacities)),
        "rung": rung,
        "budget": results.config.budgets[rung],
        "flops_spent": results.flops_spent(name, rung),
        "forward_flops_per_token": outcome.forward_flops,
        "forward_flops_over_dense": outcome.forward_flops / results.dense_flops,
        "causal_forward_flops_per_token": outcome.causal_flops,
        "loss": outcome.loss,
        "is_on_front": is_on_front,
        "steps": outcome.run.plan.steps,
        "tokens": outcome.run.plan.tokens,
        "run": outcome.run.name,
    }


def _control_row(results: Results, name: str, outcome: Outcome) -> dict[str, Any]:
    num_layers = outcome.run.resolved.model.num_layers
    plan = outcome.run.plan
    return {
        "candidate": name,
        "origin": "control",
        "capacities": " ".join(["1.0"] * num_layers),
        "rung": len(results.config.budgets) - 1,
        "budget": results.config.budgets[-1],
        "flops_spent": plan.flops,
        "forward_flops_per_token": outcome.forward_flops,
        "forward_flops_over_dense": outcome.forward_flops / results.dense_flops,
        "causal_forward_flops_per_token": outcome.causal_flops,
        "loss": outcome.loss,
        "is_on_front": False,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "run": outcome.run.name,
    }


def write_pareto(results: Results, path: Path) -> None:
    """Write the front of the last rung with the runs that made it, the best and the controls."""
    rung = len(results.outcomes) - 1
    content = {
        "objectives": ["held_out/causal_loss", "forward_flops_per_token"],
        "rung": rung,
        "budget": results.config.budgets[rung],
        "is_last_rung": results.is_complete,
        "front": [_front_entry(results, name) for name in results.front],
        "best": {"candidate": results.best, "rule": results.config.best},
        "controls": {
            name: {
                "loss": outcome.loss,
                "forward_flops_per_token": outcome.forward_flops,
                "run": outcome.run.name,
            }
            for name, outcome in results.controls.items()
        },
        "left_out": [
            {"rung": number, "candidate": name, "reason": reason}
            for number, missing in enumerate(results.missing)
            for name, reason in missing.items()
        ],
    }
    write_text(path, json.dumps(content, indent=1) + "\n")


def _front_entry(results: Results, name: str) -> dict[str, Any]:
    rung = len(results.outcomes) - 1
    outcome, entries = results.outcomes[rung][name], results.entries[name][: rung + 1]
    return {
        "candidate": name,
        "origin": entries[0].candidate.origin,
        "capacities": list(entries[0].candidate.capacities),
        "loss": outcome.loss,
        "forward_flops_per_token": outcome.forward_flops,
        "forward_flops_over_dense": outcome.forward_flops / results.dense_flops,
        "flops_spent": results.flops_spent(name, rung),
        "run": outcome.run.name,
        "trunks": [entry.trunk.name for entry in entries],
        "earlier_rungs": [entry.decay.name for entry in entries[:-1]],
    }
