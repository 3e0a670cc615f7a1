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
    table.add_row("causal loss (nats a token)", f"{figures['causal_loss']:.4f}")
    table.add_row("perplexity", f"{figures['perplexity']:.2f}")
    table.add_row("bits a byte", f"{figures['bits_per_byte']:.4f}")
    if figures["top_k_loss"] is not None:
        table.add_row("top-k loss, not causal", f"{figures['top_k_loss']:.4f}")
        table.add_row("forward FLOPs a token, top-k", f"{figures['top_k_flops']:,.0f}")
    table.add_row("forward FLOPs a token, causal", f"{figures['causal_flops']:,.0f}")
    table.add_row("the same, if dense", f"{figures['dense_equivalent_flops']:,.0f}")
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
