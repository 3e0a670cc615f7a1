"""From a strategy's name to the strategy."""

from __future__ import annotations

from importlib import import_module

from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.parallel.config import StrategyOptions
from modtrain.parallel.strategies.base import TrainingStrategy


def make_strategy(
    options: StrategyOptions, device_type: str, checkpointer: Checkpointer
) -> TrainingStrategy:
    """Make the strategy that ``options.config`` names; collective.

    Raises:
        ConfigError: the strategy is not available here.
    """
    # When it is needed: DeepSpeed takes seconds to import, and need not be installed.
    module = import_module(f"modtrain.parallel.strategies.{options.config.preset.module}")
    strategy: TrainingStrategy = module.make(options, device_type)
    strategy.attach(options, checkpointer)
    return strategy
