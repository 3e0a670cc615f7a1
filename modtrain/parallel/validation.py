"""What a strategy cannot do with a model, found before either exists. Imports nothing heavy."""

from __future__ import annotations

import re
from importlib.metadata import version

from modtrain.common.errors import Problem
from modtrain.distributed.launch import Launch, torchrun_command
from modtrain.models.config import ModelConfig
from modtrain.parallel.config import StrategyConfig, dims_of
from modtrain.parallel.dims import ParallelDims


def dims_problems(
    config: StrategyConfig, prefix: str, model: ModelConfig, launch: Launch
) -> list[Problem]:
    """Everything wrong with the strategy for this model on the processes of ``launch``."""
    world = launch.world_size
    problems: list[Problem] = []
    if config.world_size not in (None, world):
        reason = f"is not the number of the run's processes: {world}"
        remedy = "leave it null, or start as many with torchrun or srun"
        if world == 1:
            remedy += f": {torchrun_command(config.world_size)} …"
        problems.append(Problem(f"{prefix}.world_size", config.world_size, reason, remedy))
    if config.name == "single" and world > 1:
        reason = f"is for one process, and the run has {world}"
        remedy = "choose strategy=ddp, or strategy=fsdp where the model is too large for it"
        problems.append(Problem(f"{prefix}.name", config.name, reason, remedy))
    dims = dims_of(config, model, launch)
    if config.preset.is_sharded:
        problems += dims.problems(prefix, shard_is_set="shard_size" in config.preset.keys)
    if problems:
        return problems
    if (config.expert_parallel or 1) > 1 or config.preset.default == "expert_parallel":
        problems += expert_problems(config, prefix, model, dims)
    if dims.expert == 1 and not problems:
        problems += even_expert_problems(config, prefix, model, dims)
    problems += tensor_problems(model, dims.tensor)
    if dims.tensor == 1:
        problems += context_problems(model, dims.context)
    return problems


def even_expert_problems(
    config: StrategyConfig, prefix: str, model: ModelConfig, dims: ParallelDims
) -> list[Problem]:
    """Say why FSDP cannot shard a layer's experts without much waste.

    FSDP shards evenly along other dims than the first, and pads along the first: 16 experts on
    1,024 ranks would be 64 times what there is.
    """
    experts, pieces = model.experts, dims.fsdp
    if not config.preset.is_sharded or experts.count is None or experts.count >= pieces:
        return []
    matrix = (model.d_model, experts.width(model.ff_width) // dims.tensor)
    if not all(dim % pieces for dim in matrix):
        return []
    reason = (
        f"shards {experts.count} experts of {matrix[0]} x {matrix[1]} over {pieces} processes, and"
        " neither number is a multiple of it"
    )
    remedy = (
        f"use strategy=hsdp with a {prefix}.shard_size that divides one, or"
        f" {prefix}.expert_parallel"
    )
    return [Problem(f"{prefix}.name", config.name, reason, remedy)]


def expert_problems(
    config: StrategyConfig, prefix: str, model: ModelConfig, dims: ParallelDims
) -> list[Problem]:
    """Say why the experts of such a model cannot be spread so."""
    experts, key = model.experts, f"{prefix}.expert_parallel"
    if experts.count is None:
        reason = "spreads experts over processes, and model.experts.count is null"
        if config.expert_parallel is None:
            remedy = "use strategy=fsdp, or give the model experts"
            return [Problem(f"{prefix}.name", config.name, reason, remedy)]
        remedy = "leave it null, or give the model experts"
        return [Problem(key, config.expert_parallel, reason, remedy)]
    if dims.expert > 1 and torch_release() < (2, 12):
        reason = f"needs torch 2.12 or newer, and {version('torch')} is installed"
        return [Problem(key, dims.expert, reason, "install torch 2.12, or use strategy=fsdp")]
    if experts.count % dims.expert:
        reason = f"does not divide model.experts.count={experts.count}"
        return [Problem(key, dims.expert, reason, "give a divisor of both, or null")]
    width = experts.width(model.ff_width) // dims.tensor
    if dims.expert > 1 and model.d_model % dims.expert_shard and width % dims.expert_shard:
        sliced = f" / {dims.tensor}" if dims.tensor > 1 else ""
        reason = (
            f"leaves {dims.expert_shard} processes with the same experts, which shard them evenly:"
            f" neither model.d_model={model.d_model} nor the experts' width"
            f" {width * dims.tensor}{sliced} is a multiple of it"
        )
        return [Problem(key, dims.expert, reason, "raise it, or change one of the two")]
    return []


def tensor_problems(config: ModelConfig, size: int, prefix: str = "model") -> list[Problem]:
    """Say why the layers of such a model cannot be sliced over groups of ``size`` ranks."""
    problems = []
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
            problems.append(Problem(f"{prefix}.{name}", value, reason, remedy))
    if size > 1:
        problems += _attention_score_problems(config, "heads", prefix)
    return problems


def context_problems(config: ModelConfig, size: int, prefix: str = "model") -> list[Problem]:
    """Say why groups of ``size`` ranks cannot share the sequences of such a model."""
    return _attention_score_problems(config, "queries", prefix) if size > 1 else []


def _attention_score_problems(config: ModelConfig, of_all: str, prefix: str) -> list[Problem]:
    if not config.is_routed or config.router.score != "attention":
        return []
    reason = f"is made of all {of_all}, of which each process has some"
    remedy = "use a learned score, or strategy=fsdp without tensor_parallel and context_parallel"
    return [Problem(f"{prefix}.router.score", config.router.score, reason, remedy)]


def run_problems(config: StrategyConfig, prefix: str, compiles: bool) -> list[Problem]:
    """What of the rest of a run's configuration the strategy cannot have.

    compiles: whether layers are compiled.
    """
    mode, key = config.activation_checkpointing, f"{prefix}.activation_checkpointing"
    problems = []
    if config.stage == 3 and compiles:
        reason = "makes one graph of a layer, and stage 3 gathers parameters by hooks within it"
        remedy = "use false, or strategy=deepspeed_2 or strategy=fsdp"
        problems.append(Problem("compile", True, reason, remedy))
    if config.stage == 3 and mode == "selective":
        reason = "would take what gathers stage 3's parameters for the layer's own operations"
        remedy = "use full or none, or strategy=deepspeed_2 or strategy=fsdp"
        problems.append(Problem(key, mode, reason, remedy))
    slices = config.name == "fsdp_tp" or (config.tensor_parallel or 1) > 1
    if slices and compiles and mode == "full":
        reason = (
            "with compile=true and tensor parallelism: torch 2.13 would keep a mesh among the"
            " tensors for backward"
        )
        problems.append(Problem(key, mode, reason, "use selective or none, or compile=false"))
    return problems


def torch_release() -> tuple[int, int]:
    """Return the first two numbers of the installed torch's version, without importing it."""
    major, minor = re.findall(r"\d+", version("torch"))[:2]
    return int(major), int(minor)
