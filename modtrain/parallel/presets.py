"""What each word for a strategy stands for. Imports nothing heavy.

A new strategy is a line here, and a file in `modtrain.parallel.strategies` with a function
``make``.
"""

from __future__ import annotations

from typing import NamedTuple

DEGREES = ("tensor_parallel", "context_parallel", "expert_parallel")
"""The degrees that combine with each other under every strategy of FSDP."""


class Preset(NamedTuple):
    """A strategy's implementation, and the keys of `StrategyConfig` that it goes by.

    module: of `modtrain.parallel.strategies`; its ``make(options, device_type)`` returns a
        `TrainingStrategy`. keys: may be set. default: the degree that is above 1 by itself, where
        its key is null. is_sharded: parameters lie in pieces on meshes of ranks.
        zero_stage: DeepSpeed's; None where the strategy is not DeepSpeed's.
    """

    module: str
    keys: tuple[str, ...] = ()
    default: str | None = None
    is_sharded: bool = False
    zero_stage: int | None = None


def _fsdp(default: str | None = None) -> Preset:
    keys = (*DEGREES, "shard_size") if default == "shard_size" else DEGREES
    return Preset("fsdp", keys, default, is_sharded=True)


PRESETS: dict[str, Preset] = {
    "single": Preset("single"),
    "ddp": Preset("ddp"),
    "fsdp": _fsdp(),
    "hsdp": _fsdp("shard_size"),
    "fsdp_tp": _fsdp("tensor_parallel"),
    "fsdp_ep": _fsdp("expert_parallel"),
    "fsdp_cp": _fsdp("context_parallel"),
    **{f"deepspeed_{n}": Preset("deepspeed", ("offload",), zero_stage=n) for n in (1, 2, 3)},
}


def names_with(key: str) -> list[str]:
    """Return the strategies that go by ``key``."""
    return [name for name, preset in PRESETS.items() if key in preset.keys]
