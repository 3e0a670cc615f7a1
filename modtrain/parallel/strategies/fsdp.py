"""FSDP2 with tensor, context and expert parallelism, in whatever degrees."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from modtrain.models.transformer import Transformer
from modtrain.parallel.config import StrategyOptions
from modtrain.parallel.lightning_overrides import OwnMeshes
from modtrain.parallel.meshes import Meshes, make_meshes
from modtrain.parallel.parallelize import parallelize
from modtrain.parallel.strategies.base import Forward, TrainingStrategy


class FSDPStrategy(TrainingStrategy, OwnMeshes):
    """Each rank holds shards of the parameters, on the meshes of the run's degrees."""

    def __init__(self, meshes: Meshes, timeout: timedelta) -> None:
        super().__init__(timeout=timeout)
        self.meshes = meshes

    @property
    def data_rank(self) -> int:
        """Return this rank's number among those that read different data."""
        return self.meshes.data_rank

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Return how many parts the data has, and which is this rank's."""
        return {"num_replicas": self.meshes.dims.data_parallel, "rank": self.meshes.data_rank}

    def parallelize(self, model: Transformer) -> Forward:
        """Keep this rank's shards of the parameters."""
        parallelize(model, self.meshes, self.options.layers)
        return model


def make(options: StrategyOptions, device_type: str) -> TrainingStrategy:
    """Make the strategy and its meshes; collective."""
    timeout = timedelta(seconds=options.config.timeout)
    return FSDPStrategy(make_meshes(options.dims, device_type), timeout)
