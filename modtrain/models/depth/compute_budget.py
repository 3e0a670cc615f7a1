"""Limits on what a trained model computes at inference."""

from __future__ import annotations

from typing import NamedTuple


class ComputeBudget(NamedTuple):
    """Thresholds and caps for the routers; applies to causal decisions only.

    thresholds: one per router, in place of the trained threshold that its decision value has to
        exceed (see `MixtureOfDepths.decision_threshold`). For a router that ignores content
        (random, fixed) it is the share of tokens to route. None: as trained.
    layer_cap: hard cap per router: of the first n tokens of a sequence it routes at most
        floor(layer_cap x n), earlier tokens first. It counts over the whole sequence, also with
        document masking.
    step_cap: hard cap per token: the number of routed parts that it may enter, earlier layers
        first.
    """

    thresholds: tuple[float, ...] | None = None
    layer_cap: float | None = None
    step_cap: int | None = None
