"""An evaluation's figures as a table."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show(figures: dict[str, Any]) -> None:
    """Print what `evaluate_run` returned; what is not causal says so."""
    console = Console()
    table = Table(title=f"held-out text, step {figures['step']:,}, {figures['tokens']:,} tokens")
    table.add_column("")
    table.add_column("", justify="right")
    rows = {
        "causal loss (nats a token)": ("causal_loss", "{:.4f}"),
        "perplexity": ("perplexity", "{:.2f}"),
        "bits a byte": ("bits_per_byte", "{:.4f}"),
        "top-k loss, not causal": ("top_k_loss", "{:.4f}"),
        "forward FLOPs a token, causal": ("causal_flops", "{:,.0f}"),
        "forward FLOPs a token, as trained": ("top_k_flops", "{:,.0f}"),
        "the same, if dense": ("dense_equivalent_flops", "{:,.0f}"),
    }
    for title, (key, form) in rows.items():
        if figures[key] is not None:
            table.add_row(title, form.format(figures[key]))
    if figures["causal_loss"] is None:
        table.add_row("causal loss", "none: trained without router.causal")
    console.print(table)
    if len(figures["decisions"]) > 1:
        console.print(_decisions(figures))
    for name, decision in figures["decisions"].items():
        if decision["realised_capacity"]:
            console.print(_routers(name, decision))
        if decision["expert_load"]:
            console.print(_experts(name, decision["expert_load"]))


def _decisions(figures: dict[str, Any]) -> Table:
    table = Table(title="causal decisions, each by itself")
    for heading in ("", "loss", "over as trained", "forward FLOPs a token"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, decision in figures["decisions"].items():
        gap = "-"
        if figures["top_k_loss"] is not None:
            gap = f"{decision['loss'] - figures['top_k_loss']:+.4f}"
        table.add_row(name, f"{decision['loss']:.4f}", gap, f"{decision['flops']:,.0f}")
    return table


def _routers(name: str, decision: dict[str, Any]) -> Table:
    table = Table(title=f"routers: {name}" + (" against top-k" if decision["agreement"] else ""))
    headings = ["router", "capacity, causal"]
    if decision["agreement"]:
        headings += ["accuracy", "F1", "balanced accuracy"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for label, share in decision["realised_capacity"].items():
        scores = decision["agreement"].get(label, {})
        table.add_row(label, f"{share:.4f}", *(f"{value:.4f}" for value in scores.values()))
    return table


def _experts(name: str, loads: dict[str, list[float]]) -> Table:
    table = Table(title=f"experts: share of the choices, no-op experts last ({name})")
    table.add_column("layer")
    for number in range(max(map(len, loads.values()))):
        table.add_column(str(number), justify="right")
    for label, shares in loads.items():
        table.add_row(label, *(f"{share:.3f}" for share in shares))
    return table
