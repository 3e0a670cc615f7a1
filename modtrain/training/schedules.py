"""What changes over a run: the learning rate, and the capacities of routed layers.

Pure functions of configuration and step. No state is kept between steps, so accumulation, resumed
runs and recomputed activations see the same. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from modtrain.training.schedule_config import CapacityScheduleConfig, ScheduleConfig

Capacities = tuple[float | None, ...]


def num_warmup_steps(config: ScheduleConfig, num_steps: int) -> int:
    """Return the steps in which the rate rises, at least 1, in a run of ``num_steps`` steps."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return max(1, round(config.warmup * num_steps))


def decay_start(config: ScheduleConfig, num_steps: int) -> int:
    """Return the first step, counted from 0, whose rate wsd lowers."""
    decay = round(config.decay * num_steps)
    return max(num_warmup_steps(config, num_steps), num_steps - decay)


def lr_factor(config: ScheduleConfig, step: int, num_steps: int) -> float:
    """Return the rate of step ``step``, counted from 0, divided by the highest.

    The warm-up takes at least one step, so the first step is never at rate 0. The last step is
    at ``final``: the schedule's length is the run's.
    """
    warmup = num_warmup_steps(config, num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "constant":
        return 1.0
    start = decay_start(config, num_steps) if config.name == "wsd" else warmup
    # The first step of the decay is just below 1, the run's last step at ``final``.
    progress = min(1.0, max(0.0, (step + 1 - start) / max(1, num_steps - start)))
    if config.name == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return 1.0 - (1.0 - config.final) * progress


def group_lr_factor(config: ScheduleConfig, step: int, num_steps: int, start: int) -> float:
    """Return `lr_factor` of parameters that are trained from step ``start`` on.

    Their own warm-up, as long as the schedule's, bounds it from there.
    """
    if step < start:
        return 0.0
    own = (step - start + 1) / max(1, num_warmup_steps(config, num_steps)) if start else 1.0
    return lr_factor(config, step, num_steps) * min(1.0, own)


@dataclass(frozen=True)
class CapacityStage:
    """The steps from ``first``, counted from 0, to before ``stop``, with equal capacities.

    flops_per_token: executed, for training; `TrainingPlan` knows them.
    """

    first: int
    stop: int
    capacities: Capacities
    flops_per_token: float = 0.0

    @property
    def num_steps(self) -> int:
        """The number of steps."""
        return self.stop - self.first


def level_starts(config: CapacityScheduleConfig, num_steps: int) -> list[int]:
    """Return the first step of each level, from 0 up; equal ones leave the earlier level out.

    A step has the level nearest to the curve at the share of the run's tokens before it.
    """
    span = config.end - config.begin
    last = config.num_levels - 1
    starts = [0]
    for level in range(1, last + 1):
        if config.name == "step":
            share = config.end
        else:
            # A level begins halfway from the one before.
            progress = (level - 0.5) / last
            if config.name == "cosine":
                progress = math.acos(1 - 2 * progress) / math.pi
            share = config.begin + span * progress
        # Against rounding: 0.55 x 100 steps is 55.000000000000007 in floating point.
        starts.append(math.ceil(share * num_steps * (1 - 1e-12)))
    return starts


def level_capacities(
    config: CapacityScheduleConfig, final: Sequence[float | None], level: int
) -> Capacities:
    """Return each layer's capacity at ``level``: ``start`` at 0, ``final`` at the last one.

    final: the capacities of the pattern, one a layer; None, a dense layer, stays None.
    """
    last = config.num_levels - 1
    if level == last:
        return tuple(final)
    return tuple(
        None if share is None else config.start + (share - config.start) * (level / last)
        for share in final
    )


def capacity_stages(
    config: CapacityScheduleConfig, final: Sequence[float | None], num_steps: int
) -> list[CapacityStage]:
    """Return the contiguous stages of the run; neighbours differ in their capacities."""
    bounds = [*level_starts(config, num_steps), num_steps]
    stages: list[CapacityStage] = []
    for level, (first, stop) in enumerate(pairwise(bounds)):
        if first == stop:
            continue
        capacities = level_capacities(config, final, level)
        if stages and stages[-1].capacities == capacities:
            stages[-1] = CapacityStage(stages[-1].first, stop, capacities)
        else:
            stages.append(CapacityStage(first, stop, capacities))
    return stages


def is_due(step: int, every: int | None, last: int) -> bool:
    """Whether something due every ``every`` steps and at step ``last`` is due after ``step``."""
    return step == last or (every is not None and step % every == 0)
