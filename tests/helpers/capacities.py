"""What a schedule of capacities gives for one step, without its stages."""

from bisect import bisect_right
from collections.abc import Sequence

from modtrain.training.capacity_schedule import level_capacities, level_starts
from modtrain.training.config import CapacityScheduleConfig


def capacity_level(config: CapacityScheduleConfig, step: int, num_steps: int) -> int:
    """Return the level of step ``step``, counted from 0."""
    return bisect_right(level_starts(config, num_steps), step) - 1


def capacities_at(
    config: CapacityScheduleConfig, final: Sequence[float | None], step: int, num_steps: int
) -> list[float | None]:
    """Return each layer's capacity at ``step``, counted from 0; None: dense."""
    return list(level_capacities(config, final, capacity_level(config, step, num_steps)))
