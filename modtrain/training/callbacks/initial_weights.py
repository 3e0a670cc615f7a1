"""Puts the weights of another run in place before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L

from modtrain.parallel.strategies.base import TrainingStrategy


@dataclass(eq=False)
class InitialWeightsCallback(L.Callback):
    """Takes tensors of a checkpoint. sources: name in the model → name in the checkpoint."""

    path: Path
    sources: Mapping[str, str]
    with_optimizer: bool

    def on_fit_start(self, trainer: L.Trainer, *_args: Any) -> None:
        """Take them, now that the strategy has the model and the optimizer set up."""
        strategy = trainer.strategy
        if not isinstance(strategy, TrainingStrategy):
            raise TypeError("initial weights need one of modtrain's own strategies")
        strategy.take(self.path, self.sources, self.with_optimizer)
