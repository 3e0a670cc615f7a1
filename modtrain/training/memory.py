"""What a process keeps of a run's state, before anything is built. Imports nothing heavy."""

from __future__ import annotations

from modtrain.models.flops import parameters
from modtrain.optimizers.registry import OPTIMIZERS
from modtrain.parallel.dims import ParallelDims
from modtrain.training.config import TrainConfig

# In fp32, under bf16 mixed precision too.
_BYTES_PER_PARAMETER = 4


def state_bytes(config: TrainConfig, dims: ParallelDims) -> dict[str, tuple[int, int]]:
    """Return for each kind of state the bytes that a process holds, and in how many pieces it is.

    Activations are not in it. What ``strategy.offload`` moves lies in the host's memory.
    """
    optimizer = OPTIMIZERS[config.optimizer.name]
    each = _BYTES_PER_PARAMETER * parameters(config.model).total
    whole = (each, each, optimizer.state_bytes(config.model))
    names = ("weights", "gradients", optimizer.state_label)
    return {
        name: (size // pieces, pieces)
        for name, size, pieces in zip(names, whole, _pieces(config, dims), strict=True)
    }


def device_bytes(config: TrainConfig, dims: ParallelDims) -> int:
    """Return the bytes of the state that a process keeps on its device, without activations."""
    sizes = state_bytes(config, dims)
    label = OPTIMIZERS[config.optimizer.name].state_label
    off = {label} if config.strategy.offload else set()
    if config.strategy.offload and config.strategy.stage == 3:
        off.add("weights")
    return sum(size for name, (size, _) in sizes.items() if name not in off)


def gibibytes(size: int) -> str:
    """Return a number of bytes for people to read."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _pieces(config: TrainConfig, dims: ParallelDims) -> tuple[int, ...]:
    """Return in how many pieces the processes hold weights, gradients and optimizer state."""
    stage = config.strategy.stage
    cut = (stage >= 3, stage >= 2, stage >= 1) if stage else (True, True, True)
    number = dims.world_size if stage else dims.copy
    return tuple(number if is_cut else 1 for is_cut in cut)
