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
        "forward FLOPs a token, top-k": ("top_k_flops", "{:,.0f}"),
        "the same, if dense": ("dense_equivalent_flops", "{:,.0f}"),
    }
    for title, (key, form) in rows.items():
        if figures[key] is not None:
            table.add_row(title, form.format(figures[key]))
    if figures["causal_loss"] is None:
        table.add_row("causal loss", "none: trained without router.causal")
    console.print(table)
    if figures["predictor"]:
        console.print(_layers(figures))


def _layers(figures: dict[str, Any]) -> Table:
    table = Table(title="routed layers: the predictor against top-k")
    for heading in ("layer", "capacity, causal", "accuracy", "F1", "balanced accuracy"):
        table.add_column(heading, justify="right")
    for layer, scores in figures["predictor"].items():
        table.add_row(
            str(layer),
            f"{figures['realised_capacity'][layer]:.4f}",
            *(f"{scores[name]:.4f}" for name in ("accuracy", "f1", "balanced_accuracy")),
        )
    return table
