"""Learning-rate schedules, as a factor of the highest rate by step."""

from __future__ import annotations

import math

from modtrain.training.config import ScheduleConfig


def lr_factor(config: ScheduleConfig, step: int, num_steps: int) -> float:
    """Return the rate of step ``step``, counted from 0, divided by the highest.

    The warm-up takes at least one step, so the first step is never at rate 0. The last step is
    at ``final``: the schedule's length is the run's.
    """
    warmup = max(1, round(config.warmup * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "constant":
        return 1.0
    start = warmup
    if config.name == "wsd":
        start = max(warmup, num_steps - round(config.decay * num_steps))
    # The first step of the decay is just below 1, the run's last step at ``final``.
    progress = min(1.0, max(0.0, (step + 1 - start) / max(1, num_steps - start)))
    if config.name == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return 1.0 - (1.0 - config.final) * progress
