"""The plan of a search: its candidates, and the FLOPs of each rung and in all."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from modtrain.common.errors import DataError
from modtrain.experiments.pattern_search.config import PatternSearchConfig
from modtrain.experiments.pattern_search.decisions import num_survivors
from modtrain.experiments.pattern_search.runs import Entry, PlannedRun

_ROUTED_BARS, _DENSE_BAR = "▁▂▃▄▅▆▇", "█"


def show_plan(
    config: PatternSearchConfig,
    entries: Mapping[str, Sequence[Entry]],
    dense: PlannedRun,
    notes: Sequence[str],
    console: Console,
) -> None:
    """Print every candidate, the FLOPs by rung and in all, and what to beware of.

    entries: of each candidate, one a rung. dense: the run of the dense model.
    """
    table = Table(title=f"{config.name!s}: {len(entries)} candidates")
    for heading in ("candidate", "from", "layers", "capacities"):
        table.add_column(heading, overflow="fold")
    steps = [f"steps at {budget:g}" for budget in config.budgets]
    for heading in ("FLOPs over dense", *steps):
        table.add_column(heading, justify="right")
    for name, of_candidate in entries.items():
        candidate = of_candidate[0].candidate
        table.add_row(
            name,
            candidate.origin,
            bars(candidate.capacities),
            listed(candidate.capacities),
            f"{candidate.flops_over_dense:.3f}",
            *(f"{entry.decay.plan.steps:,}" for entry in of_candidate),
        )
    console.print(table)
    for line in [*notes, *_rung_lines(config, entries, dense), *_data_lines(config, entries)]:
        console.print(f"- {line}", markup=False, soft_wrap=True)


def bars(capacities: Sequence[float]) -> str:
    """Return a pattern as one bar a layer; a dense layer alone has the highest."""
    return "".join(
        _DENSE_BAR if c == 1 else _ROUTED_BARS[int(c * len(_ROUTED_BARS))] for c in capacities
    )


def listed(capacities: Sequence[float]) -> str:
    """Return the capacities as text, to four digits."""
    return " ".join(f"{capacity:.4g}" for capacity in capacities)


def _rung_lines(
    config: PatternSearchConfig, entries: Mapping[str, Sequence[Entry]], dense: PlannedRun
) -> list[str]:
    """Return the FLOPs of each rung, of the controls and in all.

    Which candidates continue is not known yet, so later rungs are means over all of them.
    """
    count, total, alone, lines = len(entries), 0.0, 0.0, []
    for rung, budget in enumerate(config.budgets):
        own = count * statistics.mean(e[rung].own_flops for e in entries.values())
        whole = count * statistics.mean(e[rung].decay.plan.flops for e in entries.values())
        lines.append(f"rung {rung}: {count} candidates to {budget:g} FLOPs each, {own:.4g} FLOPs")
        total, alone = total + own, alone + whole
        count = num_survivors(config.keep, count)
    if config.controls:
        total, alone = total + 2 * dense.plan.flops, alone + 2 * dense.plan.flops
        lines.append(f"controls: 2 runs, about {2 * dense.plan.flops:.4g} FLOPs")
    text = f"in all: {total:.4g} training FLOPs, in place of {alone:.4g} if each rung began anew"
    return [*lines, text]


def _data_lines(config: PatternSearchConfig, entries: Mapping[str, Sequence[Entry]]) -> list[str]:
    """Warn where the longest run sees its data more than once."""
    try:
        summary = config.data.summary()
    except DataError:
        return []
    tokens = summary.splits["train"].num_sequences * summary.seq_len
    most = max(of_candidate[-1].decay.plan.tokens for of_candidate in entries.values())
    if most <= tokens:
        return []
    return [
        f"warning: data repeat, up to {most / tokens:.2f} epochs of {tokens:,} tokens: cheap"
        " patterns, which see more tokens, lose by it; prepare more text"
    ]
