"""The results of a search on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from modtrain.experiments.pattern_search.plan_report import bars, listed
from modtrain.experiments.pattern_search.results import Results

_COLUMNS = ("from", "layers", "capacities", "FLOPs spent", "FLOPs over dense", "loss", "")


def show_results(results: Results, console: Console) -> None:
    """Print the candidates of the last rung there is, the controls, and what was left out."""
    rung = len(results.outcomes) - 1
    last, config = results.outcomes[rung], results.config
    table = Table(title=f"{config.name!s}: rung {rung}, {config.budgets[rung]:g} training FLOPs")
    table.add_column("candidate")
    for heading in _COLUMNS:
        is_number = heading in ("FLOPs spent", "FLOPs over dense", "loss")
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for name in sorted(last, key=lambda name: last[name].loss):
        candidate = results.entries[name][rung].candidate
        marks = ["front"] * (name in results.front) + ["best"] * (name == results.best)
        table.add_row(
            name,
            candidate.origin,
            bars(candidate.capacities),
            listed(candidate.capacities),
            f"{results.flops_spent(name, rung):.3g}",
            f"{last[name].forward_flops / results.dense_flops:.3f}",
            f"{last[name].loss:.4f}",
            ", ".join(marks),
        )
    if results.controls:
        table.add_section()
    for name, control in results.controls.items():
        share = control.forward_flops / results.dense_flops
        layers = f"{control.run.resolved.model.num_layers} dense layers"
        spent = f"{control.run.plan.flops:.3g}"
        table.add_row(name, "control", layers, "", spent, f"{share:.3f}", f"{control.loss:.4f}", "")
    console.print(table)
    for line in verdict(results):
        console.print(line, markup=False, soft_wrap=True)


def verdict(results: Results) -> list[str]:
    """Return what the best candidate is worth beside the controls."""
    best = results.best
    if best is None or not results.controls:
        return []
    loss = results.outcomes[-1][best].loss
    lines = []
    for name, control in results.controls.items():
        change = loss / control.loss - 1
        word = "below" if change < 0 else "above"
        lines.append(f"{best} is {abs(change):.2%} {word} {name} at equal training FLOPs")
    unrouted = next((c for n, c in results.controls.items() if n != "dense"), None)
    if unrouted is not None and loss >= unrouted.loss:
        lines.append(
            "on this seed its routed layers do not earn their FLOPs: without them it does better"
        )
    lines.append(
        "the best of several is chosen by its loss, on one seed: train it and its controls with"
        " several seeds before you believe a small difference (modtrain compare)"
    )
    return lines
