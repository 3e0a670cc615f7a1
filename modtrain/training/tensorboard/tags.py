"""The names of metrics on TensorBoard: a group ``main``, and the details in groups after it.

TensorBoard shows groups in alphabetical order, and a group is what stands before a name's first
slash. The names in ``metrics.jsonl`` do not change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from modtrain.training.metric_names import CAUSAL_LOSS, TOP_K_LOSS

MAIN = "main/"
EVALUATION = "validation/eval/"
TASKS = "validation/tasks/"
"""What the tags of `modtrain eval` begin with, which come after the main group: losses, scores."""
SHARE_OF_BUDGET = f"{MAIN}share_of_budget"
GAP = f"{MAIN}gap"
MAIN_TAGS = {
    "loss": f"{MAIN}loss",
    CAUSAL_LOSS: f"{MAIN}causal_loss",
    TOP_K_LOSS: f"{MAIN}top_k_loss_not_causal",
    "throughput/tokens_per_second": f"{MAIN}tokens_per_second",
    "throughput/mfu": f"{MAIN}mfu",
}
"""Metrics of the first group, with their tags there."""
_LOSSES = ("loss", CAUSAL_LOSS, TOP_K_LOSS)

_GROUPS = {"held_out": "validation", "experts": "moe"}
_LAYER = re.compile(r"(?P<group>[^/]+)/layer_[^/]+/(?P<metric>.+)")
# Metrics whose least and largest layer says more than their mean: one layer that is off is a fault.
_WITH_RANGE = ("gate_mean", "update_ratio", "chosen", "worth")

_UNITS = (("TFLOPs", 1e12, 1e16), ("GFLOPs", 1e9, 1e12), ("MFLOPs", 1e6, 0.0))


def flops_unit(flops: float) -> tuple[str, float]:
    """Return the unit for the axis of a run of so many FLOPs, and its size in FLOPs.

    TensorBoard's step is an integer of 64 bits: FLOPs themselves may not fit, and a small run would
    lie on one point of an axis of TFLOPs. Runs of 1e12 to 1e16 FLOPs have GFLOPs, larger ones
    TFLOPs, smaller ones MFLOPs, so that runs worth comparing mostly have the same axis.
    """
    return next((name, size) for name, size, least in _UNITS if flops >= least)


def tags_by_step(values: Mapping[str, float], share_of_budget: float) -> dict[str, float]:
    """Return the scalars of a record by tag: the main group, the details, means over layers.

    share_of_budget: of the run's FLOPs that are spent.
    """
    scalars = {tag_of(name): value for name, value in values.items()}
    if scalars.keys() & set(MAIN_TAGS.values()):
        scalars[SHARE_OF_BUDGET] = share_of_budget
    if CAUSAL_LOSS in values and TOP_K_LOSS in values:
        scalars[GAP] = values[CAUSAL_LOSS] - values[TOP_K_LOSS]
    return scalars | layer_summaries(values)


def tags_by_axis(values: Mapping[str, float], axis: str) -> dict[str, float]:
    """Return the losses of a record by their tags on another axis than steps."""
    return {
        f"main_by_{axis}/{MAIN_TAGS[name].removeprefix(MAIN)}": values[name]
        for name in _LOSSES
        if name in values
    }


def tag_of(metric: str) -> str:
    """Return the tag of a metric that ``metrics.jsonl`` has as ``metric``."""
    if metric in MAIN_TAGS:
        return MAIN_TAGS[metric]
    group, slash, rest = metric.partition("/")
    return f"{_GROUPS.get(group, group)}/{rest}" if slash else f"training/{metric}"


def layer_summaries(values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of each metric over the layers that have it, by tag.

    Some have their least and largest value as well.
    """
    by_metric: dict[str, list[float]] = {}
    for name, value in values.items():
        if match := _LAYER.fullmatch(name):
            group = _GROUPS.get(match["group"], match["group"])
            by_metric.setdefault(f"{group}/all_layers/{match['metric']}", []).append(value)
    scalars = {}
    for tag, layers in by_metric.items():
        scalars[tag] = sum(layers) / len(layers)
        if tag.rpartition("/")[2] in _WITH_RANGE:
            scalars |= {f"{tag}_min": min(layers), f"{tag}_max": max(layers)}
    return scalars
