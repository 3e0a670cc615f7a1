"""How a run is spread over processes. Imports nothing heavy, so that mistakes show at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from modtrain.common.errors import Problem
from modtrain.common.validation import above_zero, at_least, one_of
from modtrain.distributed.launch import Launch
from modtrain.models.config import ModelConfig

STRATEGIES = (
    *("single", "ddp", "fsdp", "hsdp", "fsdp_tp", "fsdp_ep", "fsdp_cp"),
    *("deepspeed_1", "deepspeed_2", "deepspeed_3"),
)
ACCELERATORS = ("auto", "cpu", "cuda", "mps")
ACTIVATION_CHECKPOINTING = ("none", "selective", "full")

# What only one strategy, or one family, goes by.
_OWN_KEYS = {
    "shard_size": ("hsdp",),
    "tensor_parallel": ("fsdp_tp",),
    "expert_parallel": ("fsdp_ep",),
    "context_parallel": ("fsdp_cp",),
    "offload": ("deepspeed_1", "deepspeed_2", "deepspeed_3"),
}
# Processes of a node where no launcher says it: those of the usual machine with eight GPUs.
_USUAL_NODE = 8


@dataclass
class StrategyConfig:
    """Where the run computes, and what each process holds of it.

    name: ``single``: one process. ``ddp``: each has the whole model. ``fsdp``: parameters,
        gradients and optimizer state are cut over all processes (FSDP2). ``hsdp``: over the
        ``shard_size`` processes of a group, each group with a copy. ``fsdp_tp``: within a group of
        ``tensor_parallel`` processes each layer's products are cut as well. ``fsdp_ep``: experts
        are spread over ``expert_parallel`` processes. ``fsdp_cp``: each sequence is shared out over
        ``context_parallel`` processes. ``deepspeed_1|2|3``: ZeRO's stages.
    accelerator: ``auto`` takes CUDA, then MPS, then the CPU.
    num_threads: CPU threads of the process; null leaves torch's choice.
    activation_checkpointing: what the backward pass computes again in place of keeping it:
        ``none``; ``selective``: what is cheap, the results of matrix products and attention being
        kept; ``full``: each whole layer. Recomputation is not in the FLOPs that budgets and MFU
        count.
    world_size: how many processes the run is to have; null: as many as the launcher started. A
        launcher that started another number is an error; `modtrain plan` plans for this many.
    shard_size: processes that hold one copy together; null: those of a node.
    tensor_parallel: processes that share each layer's products; null: those of a node.
    expert_parallel: processes that share the experts; null: the most that divides both the
        processes and the experts.
    context_parallel: processes that share each sequence; null: those of a node.
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
    def stage(self) -> int | None:
        """ZeRO's stage; None where the strategy is not DeepSpeed's."""
        return int(self.name[-1]) if self.name.startswith("deepspeed") else None

    def problems(self, prefix: str) -> list[Problem]:
        """Everything wrong with the strategy that needs no model and no launcher to see."""
        found = one_of(self, prefix, "name", STRATEGIES)
        found += one_of(self, prefix, "accelerator", ACCELERATORS)
        found += one_of(self, prefix, "activation_checkpointing", ACTIVATION_CHECKPOINTING)
        sizes = ("shard_size", "tensor_parallel", "expert_parallel", "context_parallel")
        found += at_least(self, prefix, 1, "num_threads", "world_size", *sizes)
        found += above_zero(self, prefix, "timeout")
        for key, names in _OWN_KEYS.items():
            value = getattr(self, key)
            if value and self.name in STRATEGIES and self.name not in names:
                reason = f"has no meaning with {prefix}.name={self.name}"
                remedy = f"leave it out, or use {' or '.join(names)}"
                found.append(Problem(f"{prefix}.{key}", value, reason, remedy))
        return found


@dataclass(frozen=True)
class Sizes:
    """How many processes there are, and in what groups; groups that are not used have size 1.

    world_size: all. shard: those that hold one copy of the parameters together. tensor: those that
    cut each layer's products. expert: those that share out the experts. context: those that share
    out each sequence.
    """

    world_size: int = 1
    shard: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1

    @property
    def data_parallel(self) -> int:
        """How many ranks, or groups of them, read different data."""
        return self.world_size // (self.tensor * self.context)


def expected_launch(config: StrategyConfig, launch: Launch) -> Launch:
    """Return ``launch``, or where nobody launched what the configuration plans for."""
    if launch.world_size > 1 or config.world_size is None:
        return launch
    local = math.gcd(config.world_size, _USUAL_NODE)
    return replace(launch, world_size=config.world_size, local_world_size=local)


def sizes_of(config: StrategyConfig, model: ModelConfig, launch: Launch) -> Sizes:
    """Return the groups that the strategy makes of the processes of ``launch``."""
    world, node = launch.world_size, launch.local_world_size
    sizes = Sizes(world)
    if config.name in ("fsdp", "fsdp_ep", "fsdp_cp"):
        sizes = replace(sizes, shard=world)
    if config.name == "hsdp":
        sizes = replace(sizes, shard=config.shard_size or node)
    if config.name == "fsdp_tp":
        tensor = config.tensor_parallel or node
        sizes = replace(sizes, tensor=tensor, shard=max(1, world // tensor))
    if config.name == "fsdp_ep":
        expert = config.expert_parallel or math.gcd(model.experts.count or 1, world)
        sizes = replace(sizes, expert=expert)
    if config.name == "fsdp_cp":
        sizes = replace(sizes, context=config.context_parallel or node)
    return sizes


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

    config: the strategy's own keys. sizes: the groups that follow from them and the processes.
    layers: what is done to each layer. accumulate: micro-batches of a step on each rank.
    """

    config: StrategyConfig
    sizes: Sizes
    layers: LayerOptions
    accumulate: int
