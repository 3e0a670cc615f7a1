"""Thresholds of routing decisions that lie between values, so that no machine's rounding decides.

Shapes: B batch, S sequence, N values.
"""

import math

from hypothesis import assume, currently_in_test_context
from torch import Tensor

from modtrain.models.depth.config import ComputeBudget, Selection
from modtrain.models.transformer import ModelOutput, Transformer

# Of float64 values: rounding moves them by a thousandth of it.
MARGIN = 1e-9


def midway(values: Tensor, share: float = 0.5, nearby: float = 0.05) -> float:
    """Return a threshold that about ``share`` of the values exceed, in the middle of a gap.

    It is the widest of the gaps that have a share of the values above them within ``nearby``.
    """
    sorted_N = values.detach().flatten().sort().values
    place, reach = (1 - share) * len(sorted_N), nearby * len(sorted_N)
    first = max(0, math.floor(place - reach) - 1)
    near_N = sorted_N[first : math.ceil(place + reach) + 1]
    gap = int(near_N.diff().argmax())
    threshold = float(near_N[gap : gap + 2].mean())
    assert margin(values, threshold) > MARGIN, "the values tie"
    return threshold


def margin(values: Tensor, threshold: Tensor | float) -> float:
    """Return the least distance of a finite value from the threshold, over the largest or 1."""
    finite_N = values.detach()[values.isfinite()]
    if not len(finite_N):
        return math.inf
    return float((finite_N - threshold).abs().min() / finite_N.abs().max().clamp(min=1))


def decision_margin(
    model: Transformer,
    output: ModelOutput,
    selection: Selection,
    budget: ComputeBudget | None = None,
) -> float:
    """Return the least `margin` of the decisions of a forward pass that use a threshold."""
    if selection == "top_k" or not model.config.router.needs_causal:
        return math.inf
    margins = [math.inf]
    for router, record in zip(model.routers, output.routing, strict=True):
        is_trained = selection == "token"
        threshold = (
            router.threshold() if is_trained else router.decision_threshold(selection, budget)
        )
        value_BS = router.decision_values(selection, record.scores_BS, record.predictor_BS)
        if record.valid_BS is not None:
            value_BS = value_BS[record.valid_BS.expand_as(value_BS)]
        margins.append(margin(value_BS, threshold))
    return min(margins)


def require_margin(
    model: Transformer,
    output: ModelOutput,
    selection: Selection,
    budget: ComputeBudget | None = None,
    least: float = MARGIN,
) -> None:
    """Fail where rounding could change a decision of ``output``; Hypothesis skips the example."""
    is_clear = decision_margin(model, output, selection, budget) > least
    if currently_in_test_context():
        assume(is_clear)
    assert is_clear, "a value equals its threshold: move the threshold, or take another seed"
