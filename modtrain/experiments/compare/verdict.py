"""What a comparison comes to, in sentences. Imports no torch."""

from __future__ import annotations

from typing import Any

from modtrain.experiments.compare.paired import PairedChange


def verdict(report: dict[str, dict[str, Any]], margin: float) -> list[str]:
    """Compare each arm with the first one, each routed arm with its control and the best dense arm.

    A sentence for each pair.
    """
    first, *others = report
    pairs = [(name, first) for name in others]
    dense = {
        arm["causal_loss"]: name
        for name, arm in report.items()
        if arm.get("is_routed") is False and arm["causal_loss"] is not None
    }
    for name, arm in report.items():
        if arm.get("is_routed"):
            rivals = [arm.get("control"), dense[min(dense)] if dense else None]
            pairs += [(name, rival) for rival in rivals if rival in report]
    return [_sentence(report, *pair, margin) for pair in dict.fromkeys(pairs)]


def _sentence(report: dict[str, dict[str, Any]], name: str, other: str, margin: float) -> str:
    """Compare the arm ``name`` with the arm ``other``."""
    arm, base = report[name], report[other]
    if arm["causal_loss"] is None or base["causal_loss"] is None:
        return f"{name} and {other} cannot be compared: one has no causal decision"
    change = PairedChange.of(arm["causal_losses"], base["causal_losses"])
    if change is None:
        change = PairedChange(arm["causal_loss"] / base["causal_loss"] - 1, 1)
    flops = arm["forward_flops_per_token"] / base["forward_flops_per_token"]
    times = (arm["micro_batch_seconds"], base["micro_batch_seconds"])
    timed = "" if None in times else f" and {times[0] / times[1]:.3f} of its step time"
    what = ", the dense model of its unrouted layers," if arm.get("control") == other else ""
    return (
        f"{name} {_relation(change)} {other}{what} at this size: causal loss"
        f" {change.mean:+.2%}{_certainty(change, margin)}, with {flops:.3f} of its forward"
        f" FLOPs{timed}"
    )


def _relation(change: PairedChange) -> str:
    if not change.is_significant:
        return "does not differ significantly from"
    return "beats" if change.mean < 0 else "loses to" if change.mean > 0 else "equals"


def _certainty(change: PairedChange, margin: float) -> str:
    if change.error is None:
        return ""
    low, high = change.interval()
    is_equivalent = change.is_equivalent(margin)
    equivalence = "equivalent" if is_equivalent else "not shown to be equivalent"
    return (
        f" ({low:+.2%} to {high:+.2%} at 95%, {change.num_seeds} seeds; {equivalence} within"
        f" ±{margin:.2%})"
    )
