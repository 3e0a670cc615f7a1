"""Results of an evaluation or a sweep as tables, TensorBoard scalars and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from modtrain.common.atomic_io import atomic_writer
from modtrain.common.terminal import plain_console
from modtrain.training.tensorboard.tags import EVALUATION

_TOP_K = "top-k, not causal"


# A value of a TensorBoard curve: tag, value, step.
Point = tuple[str, float, int]


def show(figures: dict[str, Any]) -> None:
    """Print the results of `evaluate_run`; what is not causal is labelled."""
    console = plain_console()
    kind = f"sweep of {figures['decision']}, causal" if "points" in figures else "held-out text"
    tokens = f"step {figures['step']:,}, {figures['tokens']:,} tokens"
    heading = f"{kind}, {tokens}{_format_budget(figures)}"
    if "points" in figures:
        _print(console, heading, _sweep(figures))
        return
    _print(console, heading, _summary(figures))
    selections = _selections(figures)
    if len(selections) > 1:
        _print(console, "by selection", _decisions(selections))
    if figures.get("sources"):
        _print(console, "by source", _sources(figures["sources"]))
    for name, decision in selections.items():
        if decision["realised_capacity"]:
            agreement = decision.get("agreement_with_top_k_not_causal")
            against = f" against {_TOP_K}" if agreement else ""
            if against and {"layer_cap", "step_cap"} & (figures["budget"] or {}).keys():
                against += ", before caps"
            _print(console, f"routers: {name}{against}", _routers(decision))
        if decision["expert_load"]:
            heading = f"experts: share of the choices, no-op experts last ({name})"
            _print(console, heading, _experts(decision["expert_load"]))
    if worth := figures.get("router_worth"):
        heading = f"what the routers are worth: {worth['decision']}, {worth['sequences']} sequences"
        _print(console, heading, _worth(worth))
        for line in worth_sentences(worth):
            console.print(line, soft_wrap=True)


def write_points(directory: Path, step: int, points: Iterable[Point]) -> None:
    """Write TensorBoard events, replacing earlier ones of the same checkpoint.

    They have their own directory: with a second event file in training's, TensorBoard would stop
    reading new events of a run that is still training.
    """
    suffix = f".{step:09d}"
    for old in directory.glob(f"events.out.tfevents.*{suffix}"):
        old.unlink()
    with SummaryWriter(str(directory), filename_suffix=suffix) as writer:
        for tag, value, at_step in points:
            writer.add_scalar(tag, value, at_step)


def evaluation_points(figures: dict[str, Any]) -> Iterator[Point]:
    """The results of each decision, ``validation/eval/<decision>/…``, at the checkpoint's step."""
    for name, decision in _selections(figures).items():
        values = {key: decision[key] for key in ("loss", "perplexity", "bits_per_byte")}
        values["flops_per_token"] = decision["flops"]
        if decision.get("gap_to_top_k_not_causal") is not None:
            values[f"gap to {_TOP_K}"] = decision["gap_to_top_k_not_causal"]
        for label, share in decision["realised_capacity"].items():
            values[f"{label}/realised_capacity"] = share
        for label, scores in decision.get("agreement_with_top_k_not_causal", {}).items():
            values |= {f"{label}/{key} against {_TOP_K}": scores[key] for key in scores}
        step = figures["step"]
        yield from ((f"{EVALUATION}{name}/{key}", value, step) for key, value in values.items())


def sweep_points(figures: dict[str, Any]) -> list[Point]:
    """The curve of a sweep over executed forward FLOPs per token.

    TensorBoard's step is an integer: it is in thousands of FLOPs, as the tag says.
    """
    curves = [(figures["points"], ""), ([figures["as_trained"]], " as trained")]
    return [
        (f"{EVALUATION}sweep/{key}{suffix} by kFLOPs a token", at[key], round(at["flops"] / 1000))
        for points, suffix in curves
        for at in points
        for key in ("loss", "perplexity", "bits_per_byte")
    ]


def draw_sweep(figures: dict[str, Any], path: Path) -> None:
    """Plot causal loss over executed forward FLOPs per token as a PNG."""
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    points, trained = figures["points"], figures["as_trained"]
    axes.plot(
        [at["flops"] for at in points],
        [at["loss"] for at in points],
        marker="o",
        label=f"{figures['decision']}, by capacity",
    )
    for at in points:
        place = (at["flops"], at["loss"])
        axes.annotate(
            f"{at['capacity']:g}", place, (4, 4), textcoords="offset points", fontsize="small"
        )
    axes.plot(
        trained["flops"], trained["loss"], ls="", marker="*", ms=13, color="C1", label="as trained"
    )
    # A line of FLOPs alone: the loss of a dense model is not known. It is inside the axis.
    dense = figures["dense_equivalent_flops"]
    axes.axvline(dense, ls="--", color="grey")
    axes.text(
        dense,
        0.98,
        "if dense ",
        transform=axes.get_xaxis_transform(),
        ha="right",
        va="top",
        rotation=90,
        fontsize="small",
        color="0.4",
    )
    title = f"{figures['run']}, step {figures['step']:,}{_format_budget(figures)}"
    axes.set_title(title, fontsize="medium", parse_math=False)
    axes.set_xlabel("forward FLOPs a token, executed")
    axes.set_ylabel("held-out causal loss (nats a token)")
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    with atomic_writer(path, path.parent) as file:
        figure.savefig(file, dpi=130, format="png")


def _selections(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The causal decisions, then the selection that is not causal, by displayed name."""
    top_k = figures["top_k_not_causal"]
    return {**figures["decisions"], **({} if top_k is None else {_TOP_K: top_k})}


def _format_budget(figures: dict[str, Any]) -> str:
    """Format the compute budget's settings; empty if as trained."""
    budget = figures["budget"] or {}
    return "".join(f", {name}={value:g}" for name, value in budget.items())


def _summary(figures: dict[str, Any]) -> Table:
    top_k = figures["top_k_not_causal"] or {"loss": None}
    values = [
        ("causal loss (nats a token)", figures["causal_loss"], "{:.4f}"),
        ("perplexity", figures["perplexity"], "{:.2f}"),
        ("bits a byte", figures["bits_per_byte"], "{:.4f}"),
        ("top-k loss, not causal", top_k["loss"], "{:.4f}"),
        ("forward FLOPs a token, causal", figures["causal_flops"], "{:,.0f}"),
        ("forward FLOPs a token, as trained", figures["trained_flops"], "{:,.0f}"),
        ("the same, if dense", figures["dense_equivalent_flops"], "{:,.0f}"),
    ]
    rows = [(title, form.format(value)) for title, value, form in values if value is not None]
    if figures["causal_loss"] is None:
        rows.append(("causal loss", "none: trained without router.causal"))
    table = _table(["", ""], rows)
    table.show_header = False
    return table


def _decisions(selections: dict[str, dict[str, Any]]) -> Table:
    headings = ["", "loss", "perplexity", "bits a byte", f"over {_TOP_K}", "forward FLOPs"]
    rows = []
    for name, decision in selections.items():
        gap = decision.get("gap_to_top_k_not_causal")
        loss, perplexity = f"{decision['loss']:.4f}", f"{decision['perplexity']:.2f}"
        bits, flops = f"{decision['bits_per_byte']:.4f}", f"{decision['flops']:,.0f}"
        rows.append((name, loss, perplexity, bits, "-" if gap is None else f"{gap:+.4f}", flops))
    return _table(headings, rows)


def _sources(sources: dict[str, dict[str, Any]]) -> Table:
    headings = ["source", "tokens", "loss", "perplexity", "bits a byte"]
    rows = [
        (
            name,
            f"{figures['tokens']:,}",
            f"{figures['loss']:.4f}",
            f"{figures['perplexity']:.2f}",
            f"{figures['bits_per_byte']:.4f}",
        )
        for name, figures in sources.items()
    ]
    return _table(headings, rows)


def _routers(decision: dict[str, Any]) -> Table:
    agreement = decision.get("agreement_with_top_k_not_causal", {})
    scores = ["accuracy", "F1", "balanced accuracy"] if agreement else []
    rows = [
        (label, *(f"{value:.4f}" for value in (share, *agreement.get(label, {}).values())))
        for label, share in decision["realised_capacity"].items()
    ]
    return _table(["router", "realised capacity", *scores], rows)


def _experts(loads: dict[str, list[float]]) -> Table:
    headings = ["layer", *map(str, range(max(map(len, loads.values()))))]
    rows = [(label, *(f"{share:.3f}" for share in shares)) for label, shares in loads.items()]
    return _table(headings, rows)


def _worth(worth: dict[str, Any]) -> Table:
    headings = ["choice of tokens", "gate", "router", "loss", "change", "95% interval"]
    rows = [("own", "own", "all", f"{worth['loss']:.4f}", "", "")]
    rows += [
        (
            *(row[key] for key in ("choice", "gate", "router")),
            f"{row['loss']:.4f}",
            f"{row['change']:+.2%}",
            f"{row['low']:+.2%} to {row['high']:+.2%}",
        )
        for row in worth["swaps"]
    ]
    return _table(headings, rows)


def worth_sentences(worth: dict[str, Any]) -> list[str]:
    """Say what follows from the swaps of all routers."""
    by_choice = {
        row["choice"]: row
        for row in worth["swaps"]
        if row["router"] == "all" and row["gate"] == "own"
    }
    zero, random = by_choice["zero"], by_choice["random"]
    lines = [
        f"Without the routed updates the loss changes by {zero['change']:+.2%}: no routing of these"
        " blocks can be worth more."
    ]
    if random["low"] <= 0:
        lines.append(
            "A random choice of tokens is no worse than the routers' own: the model has absorbed"
            " its routers."
        )
    else:
        lines.append(f"The routers' own choice is worth {random['change']:.2%} over a random one.")
    return lines


def _sweep(figures: dict[str, Any]) -> Table:
    points = [(f"{at['capacity']:g}", at) for at in figures["points"]]
    rows = [
        (
            title,
            f"{statistics.mean(at['realised_capacity'].values()):.4f}",
            f"{at['loss']:.4f}",
            f"{at['bits_per_byte']:.4f}",
            f"{at['flops']:,.0f}",
            f"{at['flops'] / figures['dense_equivalent_flops']:.3f}",
        )
        for title, at in [*points, ("as trained", figures["as_trained"])]
    ]
    return _table(
        ["capacity", "realised", "loss", "bits a byte", "forward FLOPs", "of dense"], rows
    )


def _print(console: Console, heading: str, table: Table) -> None:
    # As a title it would be wrapped to the table's width.
    console.print(heading, soft_wrap=True)
    console.print(table)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table()
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*row)
    return table
