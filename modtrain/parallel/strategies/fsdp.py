"""FSDP2 with tensor, context and expert parallelism, in whatever degrees."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from modtrain.models.transformer import Transformer
from modtrain.parallel.config import StrategyOptions
from modtrain.parallel.lightning_overrides import OwnMeshes
from modtrain.parallel.meshes import make_meshes
from modtrain.parallel.parallelize import parallelize
from modtrain.parallel.strategies.base import Forward, TrainingStrategy


class FSDPStrategy(TrainingStrategy, OwnMeshes):
    """Each rank holds shards of the parameters, on the meshes of the run's degrees."""

    def __init__(self, options: StrategyOptions, device_type: str) -> None:
        """Make the meshes; collective."""
        super().__init__(timeout=timedelta(seconds=options.config.timeout))
        self.meshes = make_meshes(options.dims, device_type)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Return how many parts the data has, and which is this rank's."""
        return {"num_replicas": self.options.dims.data_parallel, "rank": self.data_rank}

    def parallelize(self, model: Transformer) -> Forward:
        """Keep this rank's shards of the parameters."""
        parallelize(model, self.meshes, self.options.layers)
        return model
