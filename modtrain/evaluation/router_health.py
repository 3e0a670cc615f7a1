"""Whether routed layers do anything: the loss without their updates, and warnings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from modtrain.evaluation.held_out import HeldOut
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import RouterSwap

LEAST_WORTH = 0.001
"""A routed layer whose updates change the held-out loss by less, as a share of it, is off."""
LEAST_UPDATE = 0.01
"""So is one whose updates are smaller than this share of the residual stream."""


def zeroed_losses(
    model: ModelConfig, held_out: HeldOut, evaluate_with: Callable[[RouterSwap], HeldOut]
) -> dict[str, float]:
    """Return the relative change of the causal loss without the updates of routed layers.

    By metric: ``held_out/<router>/worth`` for each router, ``held_out/routed_worth`` for all.
    held_out: with them. evaluate_with: evaluates the first causal decision under a swap.
    """
    if held_out.causal is None or not model.is_routed:
        return {}
    swaps = {f"held_out/{label}/worth": (i,) for i, label in enumerate(model.routed_labels)}
    worth = {}
    for name, routers in {**swaps, "held_out/routed_worth": None}.items():
        zeroed = evaluate_with(RouterSwap("zero", routers=routers)).causal
        if zeroed is not None:
            worth[name] = zeroed.loss / held_out.causal.loss - 1
    return worth


def health_warnings(labels: Sequence[str], metrics: Mapping[str, float]) -> dict[str, str]:
    """Return what is wrong with routers by these metrics; the keys name the router and the fault.

    A metric that is not there is not judged.
    """
    warnings = {}
    for label in labels:
        gate = metrics.get(f"router/{label}/gate_mean")
        if gate is not None and gate < 0:
            warnings[f"{label} gate"] = (
                f"router {label}: the mean gate of its tokens is {gate:.3f}: below zero it"
                " subtracts what the layer computes"
            )
        ratio = metrics.get(f"router/{label}/update_ratio")
        if ratio is not None and ratio < LEAST_UPDATE:
            warnings[f"{label} update"] = (
                f"router {label} is all but off: its updates are {ratio:.2%} of the residual stream"
            )
        worth = metrics.get(f"held_out/{label}/worth")
        if worth is not None and worth < LEAST_WORTH:
            warnings[f"{label} worth"] = (
                f"router {label} is off: without its updates the held-out causal loss changes by"
                f" {worth:+.2%}"
            )
    return warnings
