"""What lets several budgets of one model come from one run, its trunk. Imports nothing heavy."""

from __future__ import annotations

from modtrain.common.errors import Problem
from modtrain.training.config import TrainConfig


def trunk_problems(config: TrainConfig, reason: str) -> list[Problem]:
    """Find what would keep runs of several budgets from having their first steps in common.

    reason: what is wrong with a value that differs between budgets.
    """
    schedule, action = config.schedule, config.spike.action
    rules = {
        "schedule.name": (schedule.name != "wsd", schedule.name, "schedule=wsd"),
        "schedule.warmup_steps": (
            schedule.warmup_steps is None,
            "null",
            "a number of steps, such as schedule.warmup_steps=100",
        ),
        "capacity_schedule.name": (
            config.capacity_schedule.name != "constant",
            config.capacity_schedule.name,
            "capacity_schedule=constant",
        ),
        "spike.action": (action == "roll_back", action, "another one"),
    }
    return [
        Problem(key, value, reason, f"set {remedy}")
        for key, (is_wrong, value, remedy) in rules.items()
        if is_wrong
    ]


def init_problems(config: TrainConfig, reason: str) -> list[Problem]:
    """Find weights of another run, which models of several shapes cannot all take. reason: why."""
    if config.init.run is None:
        return []
    return [Problem("init.run", config.init.run, reason, "leave it out")]
