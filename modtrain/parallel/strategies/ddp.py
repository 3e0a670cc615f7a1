"""The whole model on every rank; gradients are averaged while backward runs."""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy

from modtrain.common.torch_compat import ddp_buffer_options
from modtrain.models.transformer import Transformer
from modtrain.parallel.config import StrategyOptions
from modtrain.parallel.parallelize import prepare_layers
from modtrain.parallel.strategies.base import Forward, TrainingStrategy


class DataParallelStrategy(TrainingStrategy, DDPStrategy):
    """torch's DistributedDataParallel; Lightning chooses the device."""

    def __init__(self, options: StrategyOptions, _device_type: str) -> None:
        super().__init__(
            timeout=timedelta(seconds=options.config.timeout),
            # Thresholds and biases move alike on all ranks: see `LanguageModule.optimizer_step`.
            **ddp_buffer_options(),
            gradient_as_bucket_view=True,
        )

    def parallelize(self, model: Transformer) -> Forward:
        """Leave the model whole; layers are compiled one by one, so that gradients come early."""
        prepare_layers(model, self.options.layers)
        return model
