"""Fair controls: the dense model of a routed model's unrouted layers, alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from modtrain.models.depth.config import RouterConfig
from modtrain.training.config import TrainConfig

UNROUTED = "_unrouted"
"""Ends the name of a control."""

Config = TypeVar("Config", bound=TrainConfig)


def without_inert_settings(config: Config) -> Config:
    """Return a sound configuration without what has no effect where the model routes nothing.

    Two runs that are equal then are trained alike.
    """
    if config.model.is_routed:
        return config
    model = replace(config.model, pattern="dense", capacity=1.0, router=RouterConfig())
    return replace(config, model=model)
