"""One process with the whole model."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from modtrain.models.transformer import Transformer
from modtrain.parallel import activation_checkpointing
from modtrain.parallel.config import StrategyOptions
from modtrain.parallel.parallelize import compile_model
from modtrain.parallel.strategies.base import Forward, TrainingStrategy


class SingleProcessStrategy(TrainingStrategy, SingleDeviceStrategy):
    """One process with the whole model, which is compiled as one graph."""

    def __init__(self, _options: StrategyOptions, device_type: str) -> None:
        super().__init__(torch.device(device_type))

    def parallelize(self, model: Transformer) -> Forward:
        """Leave the model whole."""
        options = self.options.layers
        activation_checkpointing.apply(model, options.activation_checkpointing)
        forward: Forward = compile_model(model, options.num_stages) if options.compile else model
        return forward
