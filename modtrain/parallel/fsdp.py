"""Parameters, gradients and optimizer state sharded over ranks (FSDP2).

A layer is one group of FSDP: the matrices in it are gathered before it computes and let go behind
it. Everything else, the embedding, the head, and of the layers what decides (routers, predictors,
gates) and what is no matrix (gains, biases), belongs to the root's group, gathered once a step and
kept to its end:

- It stays in float32 where layers are gathered in bfloat16. What is cast is what autocast would
  have cast anyway, so a sharded model computes what a whole one computes.
- No collective stands within a layer, whose graph stays in one piece under compilation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from modtrain.common.torch_compat import shard_over
from modtrain.distributed.collectives import local_tensor
from modtrain.models.transformer import Transformer, deciding_parameters
from modtrain.parallel.meshes import Meshes

# A dim to shard by, with or without a mesh of its own, or None for the first dim.
_Placement = Callable[[nn.Parameter], Any]


def apply_fsdp(model: Transformer, meshes: Meshes, precision: str = "fp32") -> None:
    """Shard every parameter in place, with the gradients and optimizer state that follow.

    precision: ``fp32`` or ``bf16``, in which layers' matrices are gathered.
    """
    # What a forward pass gives is summed and looked at, never changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    layers = list(model.layers)
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        # Autocast sees to the inputs: the residual stream is to stay as wide as it is.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    of_layers = {matrix for layer in layers for matrix in _matrices(layer)}
    # Before the layers, or FSDP would not look into them for the root's own.
    fully_shard(
        model,
        mesh=meshes.root,
        ignored_params=of_layers,
        shard_placement_fn=_placement(meshes.root),
    )
    of_root = set(model.parameters()) - of_layers
    place = _placement(meshes.layers)
    if meshes.experts is not None:
        place = _expert_placement(meshes.experts, place)
    for layer in layers:
        fully_shard(
            layer,
            mesh=meshes.layers,
            mp_policy=policy,
            ignored_params=of_root,
            shard_placement_fn=place,
        )
    model.register_forward_hook(_reshard_after_evaluation)


def _reshard_after_evaluation(model: nn.Module, _inputs: Any, _output: Any) -> None:
    """Let go of the root's group where no backward will: parameters are to be found in pieces."""
    if isinstance(model, FSDPModule) and not torch.is_grad_enabled():
        model.reshard()


def _matrices(layer: nn.Module) -> Iterator[nn.Parameter]:
    """Give the parameters that a layer's products are made of, but for those that decide.

    Also biases that tensor parallelism has sliced: the root is sharded over tensor ranks as well.
    """
    deciding = deciding_parameters(layer)
    for parameter in layer.parameters():
        is_matrix = parameter.ndim >= 2 or isinstance(parameter, DTensor)
        if is_matrix and parameter not in deciding:
            yield parameter


def _placement(mesh: DeviceMesh) -> _Placement:
    """Say by which dim to shard a parameter: the first, but where that would waste much.

    The pieces that ranks exchange are as large as the largest one. Eight experts on 64 ranks by
    the first dim would be eight times what there is.
    """
    size = mesh.size(mesh.ndim - 1)

    def place(parameter: nn.Parameter) -> Shard | None:
        local = local_tensor(parameter)
        if parameter.ndim < 3 or local.shape[0] % size == 0:
            return None
        even = (dim for dim in range(1, local.ndim) if local.shape[dim] % size == 0)
        return next(map(Shard, even), None)

    return place


def _expert_placement(experts: DeviceMesh, other: _Placement) -> _Placement:
    """Shard the matrices of spread experts over the mesh ``experts``; the rest as ``other`` says.

    They belong to the group of their layer, and are gathered with it: no hook stands within the
    layer's graph.
    """
    shard = shard_over(experts)
    size = experts.size(experts.ndim - 1)

    def place(weight: nn.Parameter) -> Any:
        if not isinstance(weight, DTensor) or "expert" not in (
            weight.device_mesh.mesh_dim_names or ()
        ):
            return other(weight)
        # Dim 0 is the experts'; of the others only even parts are possible. One that tensor
        # parallelism has sliced comes last.
        sliced = {p.dim for p in weight.placements if isinstance(p, Shard)}
        even = [dim for dim in (1, 2) if local_tensor(weight).shape[dim] % size == 0]
        dim = min(even, key=lambda dim: (dim in sliced, dim))
        return shard(dim)

    return place
