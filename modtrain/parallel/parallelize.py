"""A whole model made into one rank's share of it, from outside."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from modtrain.common.torch_compat import compile_options
from modtrain.models.transformer import Transformer
from modtrain.parallel import activation_checkpointing
from modtrain.parallel.config import LayerOptions
from modtrain.parallel.context import apply_context_parallel
from modtrain.parallel.expert import apply_expert_parallel
from modtrain.parallel.fsdp import apply_fsdp
from modtrain.parallel.meshes import Meshes
from modtrain.parallel.tensor import apply_tensor_parallel


def parallelize(model: Transformer, meshes: Meshes, options: LayerOptions) -> None:
    """Apply every kind of parallelism that ``meshes`` is for, in place. Again, it does nothing.

    Matrices are sliced before the sequences' chunks are, for a slice computes whatever tokens it
    is given; experts are spread with the slices that they have. Then layers are checkpointed and
    compiled, and FSDP shards what is left of each around that.

    Names of parameters and the state dict's are those of the whole model, and buffers are on every
    rank whole. All ranks have to hold equal weights before. Gradients are means over all ranks:
    where a rank's gradient is a part of a sum over a group, it counts as often as the group has
    ranks.

    Raises:
        ConfigError: the model cannot be computed so; see `modtrain.parallel.validation`.
    """
    if isinstance(model, FSDPModule):
        return
    if meshes.tensor is not None:
        apply_tensor_parallel(model, meshes.tensor, meshes.dims.context)
    if meshes.context is not None:
        apply_context_parallel(model, meshes.context)
    if meshes.expert is not None:
        apply_expert_parallel(model, meshes.expert)
    prepare_layers(model, options)
    apply_fsdp(model, meshes, options.precision)


def prepare_layers(model: Transformer, options: LayerOptions) -> None:
    """Checkpoint and compile each layer in place, as FSDP and DDP want to find them.

    The graphs are training's alone: `HeldOutCallback` evaluates without the compiler.
    """
    activation_checkpointing.apply(model, options.activation_checkpointing)
    if options.compile:
        for layer in model.layers:
            layer.compile(**_one_graph_a_stage(options.num_stages))


def compile_model(model: Transformer, num_stages: int = 1) -> Any:
    """Compile the whole model in one graph for each stage of the schedule of capacities."""
    return torch.compile(model, **_one_graph_a_stage(num_stages))


def _one_graph_a_stage(num_stages: int) -> dict[str, Any]:
    # Layers, and other models in the process, do not count against each other's limit.
    limit = compile_options(recompile_limit=max(8, num_stages + 1))
    return {"fullgraph": True, "dynamic": False, **limit}
