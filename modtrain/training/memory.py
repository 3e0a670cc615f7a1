"""What a process keeps of a run's state, before anything is built. Imports nothing heavy."""

from __future__ import annotations

from modtrain.models.flops import parameters
from modtrain.parallel.dims import ParallelDims
from modtrain.training.config import TrainConfig

# fp32 weights, gradients, and AdamW's two moments; bf16 mixed precision keeps these in fp32 too.
_BYTES_PER_PARAMETER = {"weights": 4, "gradients": 4, "AdamW moments": 8}


def state_bytes(config: TrainConfig, dims: ParallelDims) -> dict[str, tuple[int, int]]:
    """Return for each kind of state the bytes that a process holds, and in how many pieces it is.

    Activations are not in it. What ``strategy.offload`` moves lies in the host's memory.
    """
    count, pieces = parameters(config.model).total, _pieces(config, dims)
    return {
        name: (count * size // pieces[name], pieces[name])
        for name, size in _BYTES_PER_PARAMETER.items()
    }


def device_bytes(config: TrainConfig, dims: ParallelDims) -> int:
    """Return the bytes of the state that a process keeps on its device, without activations."""
    held = state_bytes(config, dims)
    off = {"AdamW moments"} if config.strategy.offload else set()
    if config.strategy.offload and config.strategy.stage == 3:
        off.add("weights")
    return sum(size for name, (size, _) in held.items() if name not in off)


def gibibytes(size: int) -> str:
    """Return a number of bytes for people to read."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _pieces(config: TrainConfig, dims: ParallelDims) -> dict[str, int]:
    """Return in how many pieces the processes hold each kind of state, one piece each."""
    stage = config.strategy.stage
    cut = (stage >= 3, stage >= 2, stage >= 1) if stage else (True, True, True)
    number = dims.world_size if stage else dims.copy
    return {
        name: number if is_cut else 1
        for name, is_cut in zip(_BYTES_PER_PARAMETER, cut, strict=True)
    }
