"""What a strategy cannot do with a model, told before either exists. Imports nothing heavy."""

from __future__ import annotations

from modtrain.common.errors import Problem
from modtrain.distributed.launch import Launch
from modtrain.models.config import ModelConfig
from modtrain.parallel.config import Sizes, StrategyConfig, sizes_of


def size_problems(
    config: StrategyConfig, prefix: str, model: ModelConfig, launch: Launch
) -> list[Problem]:
    """Everything wrong with the strategy for this model on the processes of ``launch``."""
    world = launch.world_size
    found: list[Problem] = []
    if config.world_size not in (None, world):
        reason = f"is not the number of processes that were started: {world}"
        remedy = "leave it null, or start as many with torchrun or srun"
        found.append(Problem(f"{prefix}.world_size", config.world_size, reason, remedy))
    if config.name == "single" and world > 1:
        reason = f"is for one process, and {world} were started"
        remedy = "choose strategy=ddp, or strategy=fsdp where the model is too large for it"
        found.append(Problem(f"{prefix}.name", config.name, reason, remedy))
    sizes = sizes_of(config, model, launch)
    for key, size in (
        ("shard_size", sizes.shard if config.name == "hsdp" else 1),
        ("tensor_parallel", sizes.tensor),
        ("expert_parallel", sizes.expert),
        ("context_parallel", sizes.context),
    ):
        if world % size:
            remedy = "give a divisor of it"
            reason = f"does not divide the {world} processes"
            found.append(Problem(f"{prefix}.{key}", size, reason, remedy))
    if found:
        return found
    if config.name == "fsdp_tp":
        found += tensor_problems(model, sizes.tensor)
    found += piece_problems(config, prefix, model, sizes)
    if config.name == "fsdp_ep":
        found += expert_problems(config, prefix, model, sizes)
    if config.name == "fsdp_cp":
        found += context_problems(model, sizes.context)
    return found


def piece_problems(
    config: StrategyConfig, prefix: str, model: ModelConfig, sizes: Sizes
) -> list[Problem]:
    """Say why a layer's experts cannot be cut into one piece a rank without much waste.

    FSDP cuts evenly along other dims than the first, and fills up along the first: 16 experts on
    1,024 ranks would be 64 times what there is.
    """
    experts, pieces = model.experts, sizes.shard
    dims = (model.d_model, experts.width(model.ff_width) // sizes.tensor)
    if config.name == "fsdp_ep" or experts.count is None or experts.count >= pieces:
        return []
    if not all(dim % pieces for dim in dims):
        return []
    reason = (
        f"cuts {experts.count} experts of {dims[0]} x {dims[1]} into {pieces} pieces, and neither"
        " number comes out even"
    )
    remedy = f"use strategy=hsdp with a {prefix}.shard_size that divides one, or strategy=fsdp_ep"
    return [Problem(f"{prefix}.name", config.name, reason, remedy)]


def expert_problems(
    config: StrategyConfig, prefix: str, model: ModelConfig, sizes: Sizes
) -> list[Problem]:
    """Say why the experts of such a model cannot be spread so."""
    experts, key = model.experts, f"{prefix}.expert_parallel"
    if experts.count is None:
        reason = "spreads experts over processes, and model.experts.count is null"
        remedy = "use strategy=fsdp, or give the model experts"
        return [Problem(f"{prefix}.name", config.name, reason, remedy)]
    if experts.count % sizes.expert:
        reason = f"does not divide model.experts.count={experts.count}"
        return [Problem(key, sizes.expert, reason, "give a divisor of both, or null")]
    copies, width = sizes.world_size // sizes.expert, experts.width(model.ff_width)
    if sizes.expert > 1 and model.d_model % copies and width % copies:
        reason = (
            f"leaves {copies} processes with the same experts, which cut them evenly: neither"
            f" model.d_model={model.d_model} nor the experts' width {width} is a multiple of it"
        )
        return [Problem(key, sizes.expert, reason, "raise it, or change one of the two")]
    return []


def tensor_problems(config: ModelConfig, size: int, prefix: str = "model") -> list[Problem]:
    """Say why the layers of such a model cannot be cut over groups of ``size`` ranks."""
    found = []
    numbers: list[tuple[str, int]] = []
    if "attention" in config.mixers:
        numbers += [("num_heads", config.num_heads), ("num_kv_heads", config.kv_heads)]
    if "convolution" in config.mixers:
        numbers.append(("d_model", config.d_model))
    mixtures = [config.has_experts(layer) for layer in range(config.num_layers)]
    if not all(mixtures):
        numbers.append(("d_ff", config.ff_width))
    if any(mixtures):
        numbers.append(("experts.dim", config.experts.width(config.ff_width)))
    for name, value in numbers:
        if value % size:
            reason = f"cannot be split evenly over {size} processes"
            remedy = f"use a multiple of {size}, or another strategy.tensor_parallel"
            found.append(Problem(f"{prefix}.{name}", value, reason, remedy))
    if config.is_routed and config.router.score == "attention" and size > 1:
        reason = "is made of all heads, of which each process has some"
        remedy = "use a learned score, or strategy=fsdp"
        found.append(Problem(f"{prefix}.router.score", config.router.score, reason, remedy))
    return found


def context_problems(config: ModelConfig, size: int, prefix: str = "model") -> list[Problem]:
    """Say why sequences of such a model cannot be shared out over groups of ``size`` ranks."""
    if size == 1 or not config.is_routed or config.router.score != "attention":
        return []
    reason = "is made of all queries, of which each process has some"
    remedy = "use a learned score, or strategy=fsdp"
    return [Problem(f"{prefix}.router.score", config.router.score, reason, remedy)]


def run_problems(config: StrategyConfig, prefix: str, compiles: bool) -> list[Problem]:
    """What of the rest of a run's configuration the strategy cannot have.

    compiles: whether layers are compiled.
    """
    mode, key = config.activation_checkpointing, f"{prefix}.activation_checkpointing"
    found = []
    if config.stage == 3 and compiles:
        reason = "makes one graph of a layer, and stage 3 gathers parameters by hooks within it"
        remedy = "use false, or strategy=deepspeed_2 or strategy=fsdp"
        found.append(Problem("compile", True, reason, remedy))
    if config.stage == 3 and mode == "selective":
        reason = "would take what gathers stage 3's parameters for the layer's own operations"
        remedy = "use full or none, or strategy=deepspeed_2 or strategy=fsdp"
        found.append(Problem(key, mode, reason, remedy))
    if config.name == "fsdp_tp" and compiles and mode == "full":
        reason = "with compile=true: torch 2.13 would keep a mesh among the tensors for backward"
        found.append(Problem(key, mode, reason, "use selective or none, or compile=false"))
    return found
