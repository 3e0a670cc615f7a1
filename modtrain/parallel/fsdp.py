"""A whole model made into one rank's share of it, from outside: a function a strategy.

The order is the same in all of them: slices of matrices (tensor parallel), activation
checkpointing, compilation of each layer, and FSDP2 around what that left. A layer is one group of
FSDP: the matrices in it are gathered before it computes and let go behind it. Everything else, the
embedding, the head, and of the layers what decides (routers, predictors, gates) and what is no
matrix (gains, biases), belongs to the root's group, gathered once a step and kept to its end:

- It stays in float32 where layers are gathered in bfloat16. What is cast is what autocast would
  have cast anyway, so a sharded model computes what a whole one computes.
- No collective stands within a layer, whose graph stays in one piece under compilation.

Buffers are on every rank whole. Names of parameters and the state dict's are those of the whole
model. All ranks have to hold equal weights before; gradients are means over the ranks that read
different data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from modtrain.models.depth.layer import MixtureOfDepths
from modtrain.models.experts.layer import Experts
from modtrain.models.transformer import Transformer
from modtrain.parallel import activation_checkpointing
from modtrain.parallel import context as context_parallel
from modtrain.parallel import expert as expert_parallel
from modtrain.parallel import tensor as tensor_parallel
from modtrain.parallel.config import LayerOptions
from modtrain.parallel.meshes import Meshes


def fsdp(model: Transformer, meshes: Meshes, options: LayerOptions) -> None:
    """Cut parameters, gradients and optimizer state over all ranks. Again, it does nothing."""
    if isinstance(model, FSDPModule):
        return
    prepare_layers(model, options)
    shard(model, meshes, options)


def hsdp(model: Transformer, meshes: Meshes, options: LayerOptions) -> None:
    """Cut them over the ranks of a group, with a copy in each group. Again, it does nothing."""
    # The meshes have two axes: that is all the difference.
    fsdp(model, meshes, options)


def fsdp_tp(model: Transformer, meshes: Meshes, options: LayerOptions) -> None:
    """Slice layers over the ranks of a group, and cut all over the groups. Again, nothing.

    Raises:
        ConfigError: the layers cannot be cut so; see `strategy_problems.tensor_problems`.
    """
    if isinstance(model, FSDPModule):
        return
    tensor_parallel.slice_layers(model, meshes.tensor)
    prepare_layers(model, options)
    shard(model, meshes, options)


def fsdp_ep(model: Transformer, meshes: Meshes, options: LayerOptions) -> None:
    """Spread experts over groups of ranks, and cut everything over all. Again, it does nothing.

    Raises:
        ConfigError: the experts cannot be split so.
    """
    if isinstance(model, FSDPModule):
        return
    expert, expert_data = meshes.whole["expert"], meshes.whole["expert_data"]
    expert_parallel.shard_experts(model, expert, expert_data)
    prepare_layers(model, options)
    place = expert_parallel.placement(expert_data, _placement(meshes.layers))
    shard(model, meshes, options, place)
    for layer in model.layers:
        if isinstance(layer, FSDPModule):
            expert_parallel.average(layer, expert_data, meshes.whole.size())


def fsdp_cp(model: Transformer, meshes: Meshes, options: LayerOptions) -> None:
    """Share each sequence out over a group, and cut parameters over all ranks. Again, nothing.

    Raises:
        ConfigError: the model cannot be computed so.
    """
    if isinstance(model, FSDPModule):
        return
    context_parallel.share_sequences(model, meshes.context)
    fsdp(model, meshes, options)


def prepare_layers(model: Transformer, options: LayerOptions) -> None:
    """Checkpoint and compile each layer in place, as FSDP wants to find them."""
    activation_checkpointing.apply(model, options.activation_checkpointing)
    for layer in model.layers:
        if options.compile:
            layer.compile(
                fullgraph=True,
                dynamic=False,
                # Unknown to the types of torch 2.13. Layers do not count against each other.
                # Training's graphs alone: `HeldOutCallback` evaluates without the compiler.
                recompile_limit=max(8, options.num_stages + 1),
                isolate_recompiles=True,
            )


def shard(
    model: Transformer,
    meshes: Meshes,
    options: LayerOptions,
    place: expert_parallel.Placement | None = None,
) -> None:
    """Apply FSDP2. place: where a layer's parameters go; None: over ``meshes.layers``."""
    # What a forward pass gives is summed and looked at, never changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    layers = list(model.layers)
    policy = MixedPrecisionPolicy()
    if options.precision == "bf16":
        # Autocast sees to the inputs: the residual stream is to stay as wide as it is.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    of_layers = {matrix for layer in layers for matrix in _matrices(layer)}
    # Before the layers, or FSDP would not look into them for the root's own.
    fully_shard(
        model,
        mesh=meshes.rest,
        ignored_params=of_layers,
        shard_placement_fn=_placement(meshes.rest),
    )
    of_root = set(model.parameters()) - of_layers
    for layer in layers:
        fully_shard(
            layer,
            mesh=meshes.layers,
            mp_policy=policy,
            ignored_params=of_root,
            shard_placement_fn=place or _placement(meshes.layers),
        )
    model.register_forward_hook(_cut_again)


def _cut_again(model: nn.Module, _inputs: Any, _output: Any) -> None:
    """Let go of the root's group where no backward will: parameters are to be found in pieces."""
    if isinstance(model, FSDPModule) and not torch.is_grad_enabled():
        model.reshard()


def _matrices(layer: nn.Module) -> Iterator[nn.Parameter]:
    """Give the parameters that a layer's products are made of, but for those that decide."""
    deciding: set[nn.Parameter] = set()
    for module in layer.modules():
        parts: tuple[nn.Module | None, ...] = ()
        if isinstance(module, MixtureOfDepths):
            parts = (module.router, module.predictor, module.gate)
        elif isinstance(module, Experts):
            parts = (module.expert_router,)
        deciding.update(p for part in parts if part is not None for p in part.parameters())
    for parameter in layer.parameters():
        if parameter.ndim >= 2 and parameter not in deciding:
            yield parameter


def _placement(mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard | None]:
    """Say by which dim to cut a parameter: the first, but where that would waste much.

    The pieces that ranks exchange are as large as the largest one. Eight experts on 64 ranks by
    the first dim would be eight times what there is.
    """
    size = mesh.size(mesh.ndim - 1)

    def place(parameter: nn.Parameter) -> Shard | None:
        local: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.ndim < 3 or local.shape[0] % size == 0:
            return None
        even = (dim for dim in range(1, local.ndim) if local.shape[dim] % size == 0)
        return next(map(Shard, even), None)

    return place
