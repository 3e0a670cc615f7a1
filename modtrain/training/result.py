"""The result of a complete run."""

from __future__ import annotations

import math
from typing import Any

from modtrain.common.errors import TrainingError
from modtrain.training.metrics_log import read_metrics
from modtrain.training.plan import TrainingPlan
from modtrain.training.run_directory import RunDirectory


def finite_result(plan: TrainingPlan, run: RunDirectory) -> dict[str, Any]:
    """Return the run's result, or raise TrainingError if its last held-out loss is none."""
    result = _result(plan, run)
    lost = [key for key in result if key.startswith("held_out/") and key.endswith("loss")]
    # Earlier versions wrote NaN.
    lost = [key for key in lost if result[key] is None or not math.isfinite(result[key])]
    if lost:
        skipped = result.get("spike/skipped") or 0
        raise TrainingError(
            f"{run.path} came to its last step, and {lost[0]} is not finite; {skipped:.0f} of"
            f" {plan.steps} steps were skipped as spikes. It does not count as complete\n"
            "remedy: give another name= and a lower optimizer.lr"
        )
    return result


def _result(plan: TrainingPlan, run: RunDirectory) -> dict[str, Any]:
    """Return the content of the run's result: its size, and the last value of each metric."""
    values: dict[str, Any] = {}
    for record in read_metrics(run.metrics, with_null=True):
        values.update(record)
    return {**values, "steps": plan.steps, "tokens": plan.tokens, "flops": plan.flops}
