"""How a run is spread over processes. Imports nothing heavy, so that mistakes show at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, one_of
from modtrain.distributed.launch import Launch
from modtrain.models.config import ModelConfig
from modtrain.parallel.dims import ParallelDims

ACCELERATORS = ("auto", "cpu", "cuda", "mps")
ACTIVATION_CHECKPOINTING = ("none", "selective", "full")
DEGREES = ("tensor_parallel", "context_parallel", "expert_parallel")
"""The degrees that combine with each other under every strategy of FSDP."""

# Processes of a node where no launcher says it: those of the usual machine with eight GPUs.
_USUAL_NODE = 8


class Preset(NamedTuple):
    """What a word for a strategy stands for.

    implementation: file and class in `modtrain.parallel.strategies`, made with
        ``(options, device_type)``. keys: of `StrategyConfig` that may be set. default: the degree
        that is above 1 by itself, where its key is null. is_sharded: parameters lie in pieces on
        meshes of ranks. zero_stage: DeepSpeed's; None where the strategy is not DeepSpeed's.
    """

    implementation: str
    keys: tuple[str, ...] = ()
    default: str | None = None
    is_sharded: bool = False
    zero_stage: int | None = None


def _fsdp(default: str | None = None) -> Preset:
    keys = (*DEGREES, "shard_size") if default == "shard_size" else DEGREES
    return Preset("fsdp.FSDPStrategy", keys, default, is_sharded=True)


PRESETS = {
    "single": Preset("single.SingleProcessStrategy"),
    "ddp": Preset("ddp.DataParallelStrategy"),
    "fsdp": _fsdp(),
    "hsdp": _fsdp("shard_size"),
    "fsdp_tp": _fsdp("tensor_parallel"),
    "fsdp_ep": _fsdp("expert_parallel"),
    "fsdp_cp": _fsdp("context_parallel"),
    **{
        f"deepspeed_{stage}": Preset("deepspeed.DeepSpeedStrategy", ("offload",), zero_stage=stage)
        for stage in (1, 2, 3)
    },
}
"""The strategies by name."""


@dataclass
class StrategyConfig:
    """Where the run computes, and what each process holds of it.

    name: ``single``: one process. ``ddp``: each has the whole model. ``fsdp``: parameters,
        gradients and optimizer state are sharded over all processes (FSDP2). ``hsdp``: over
        ``shard_size`` processes, in several copies. ``fsdp_tp``, ``fsdp_ep``, ``fsdp_cp``: as
        ``fsdp``, with tensor, expert or context parallelism on by default.
        ``deepspeed_1|2|3``: ZeRO's stages.
    accelerator: ``auto`` takes CUDA, then MPS, then the CPU.
    num_threads: CPU threads of the process; null leaves torch's choice.
    activation_checkpointing: what the backward pass computes again in place of keeping it:
        ``none``; ``selective``: what is cheap, the results of matrix products and attention being
        kept; ``full``: each whole layer. Recomputation is not in the FLOPs that budgets and MFU
        count.
    world_size: how many processes the run is to have; null: as many as the launcher started. A
        launcher that started another number is an error; `modtrain plan` plans for this many.
    shard_size: of ``hsdp``: processes that one copy is sharded over, beside the tensor- and
        context-parallel ones; null: those of a node.
    tensor_parallel: processes that share each matrix of a layer; null: 1, with ``fsdp_tp`` those
        of a node. Degrees combine under ``fsdp``, ``hsdp`` and ``fsdp_*``.
    expert_parallel: processes that share the experts; null: 1, with ``fsdp_ep`` the most that
        divides both the processes and the experts.
    context_parallel: processes that share each sequence; null: 1, with ``fsdp_cp`` those of a
        node.
    offload: keep optimizer state, and with stage 3 parameters, in the CPU's memory.
    timeout: seconds after which a process that waits for another one gives up.
    """

    name: str = "single"
    accelerator: str = "auto"
    num_threads: int | None = None
    activation_checkpointing: str = "none"
    world_size: int | None = None
    shard_size: int | None = None
    tensor_parallel: int | None = None
    expert_parallel: int | None = None
    context_parallel: int | None = None
    offload: bool = False
    timeout: float = 600.0

    @property
    def preset(self) -> Preset:
        """What the name stands for. Raises KeyError for a name that is not known."""
        return PRESETS[self.name]

    @property
    def stage(self) -> int | None:
        """ZeRO's stage; None where the strategy is not DeepSpeed's."""
        return self.preset.zero_stage if self.name in PRESETS else None

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the strategy that needs no model and no launcher to see."""
        problems = one_of(self, prefix, "name", tuple(PRESETS))
        problems += one_of(self, prefix, "accelerator", ACCELERATORS)
        problems += one_of(self, prefix, "activation_checkpointing", ACTIVATION_CHECKPOINTING)
        problems += at_least(self, prefix, 1, "num_threads", "world_size", "shard_size", *DEGREES)
        problems += above_zero(self, prefix, "timeout")
        for key in ("shard_size", *DEGREES, "offload"):
            value = getattr(self, key)
            if value and self.name in PRESETS and key not in self.preset.keys:
                reason = f"cannot be combined with {prefix}.name={self.name}"
                names = [name for name, preset in PRESETS.items() if key in preset.keys]
                remedy = f"leave it out, or use {' or '.join(names)}"
                problems.append(Problem(f"{prefix}.{key}", value, reason, remedy))
        return problems


def expected_launch(config: StrategyConfig, launch: Launch) -> Launch:
    """Return ``launch``; without a launcher, the one that the configuration plans for."""
    if launch.world_size > 1 or config.world_size is None:
        return launch
    local = math.gcd(config.world_size, _USUAL_NODE)
    return replace(launch, world_size=config.world_size, local_world_size=local)


def dims_of(config: StrategyConfig, model: ModelConfig, launch: Launch) -> ParallelDims:
    """Return the degrees that the strategy gives to the processes of ``launch``.

    They may not fit: see `ParallelDims.problems` and `validation.dims_problems`.
    """
    world, node, preset = launch.world_size, launch.local_world_size, config.preset
    if not preset.is_sharded:
        return ParallelDims(world, replicate=world)

    def degree(key: str, others: int) -> int:
        """The degree that is set, or by default what ``others`` leave of a node."""
        by_default = max(1, node // others) if preset.default == key else 1
        return getattr(config, key) or by_default

    tensor = degree("tensor_parallel", config.context_parallel or 1)
    context = degree("context_parallel", tensor)
    shard = max(1, world // (tensor * context))
    if preset.default == "shard_size":
        shard = degree("shard_size", tensor * context)
    replicate = max(1, world // (shard * context * tensor))
    expert = config.expert_parallel or 1
    if preset.default == "expert_parallel" and config.expert_parallel is None:
        expert = math.gcd(model.experts.count or 1, shard * context)
    return ParallelDims(world, replicate, shard, context, tensor, expert)


@dataclass(frozen=True)
class LayerOptions:
    """What is done to each layer beside sharding it.

    precision: ``fp32`` or ``bf16``, in which layers' matrices are then gathered; what computes in
        it is autocast. activation_checkpointing: see `activation_checkpointing.apply`. compile: one
        graph a layer. num_stages: of the schedule of capacities, each of which is compiled anew.
    """

    precision: str = "fp32"
    activation_checkpointing: str = "none"
    compile: bool = False
    num_stages: int = 1


@dataclass(frozen=True)
class StrategyOptions:
    """All that a strategy needs to know of a run.

    config: the strategy's own keys. dims: the degrees that follow from them and the processes.
    layers: what is done to each layer.
    """

    config: StrategyConfig
    dims: ParallelDims
    layers: LayerOptions
