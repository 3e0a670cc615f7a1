"""Which ranks do what together: the meshes that follow from a run's degrees of parallelism."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from modtrain.parallel.dims import ParallelDims


@dataclass(frozen=True)
class Meshes:
    """The ranks' meshes: made once in a run, for making them is collective.

    The axes of FSDP's meshes are (shard,) or, where the model has several copies,
    (replicate, shard).

    dims: the degrees that they are made of.
    layers: what FSDP shards the matrices of a layer over: shard and context ranks.
    root: what it shards everything else over: tensor ranks as well.
    tensor: 1-D, the ranks that share each matrix; None where each has it whole.
    context: 1-D, the ranks that share each sequence; None where each has it whole.
    expert: the ranks that share the experts, (expert,) or with tensor parallelism
        (expert, tensor); None where each has all of them.
    experts: what FSDP shards the spread experts over; None where ``expert`` is.
    """

    dims: ParallelDims
    layers: DeviceMesh
    root: DeviceMesh
    tensor: DeviceMesh | None = None
    context: DeviceMesh | None = None
    expert: DeviceMesh | None = None
    experts: DeviceMesh | None = None


def make_meshes(dims: ParallelDims, device_type: str = "cpu") -> Meshes:
    """Make the meshes of all ranks; collective, and the same on each of them.

    Raises:
        ValueError: the degrees do not fit the ranks that there are.
    """
    if problems := dims.problems("strategy", shard_is_set=True):
        raise ValueError("; ".join(map(str, problems)))
    if dims.world_size != dist.get_world_size():
        raise ValueError(f"meshes for {dims.world_size} of {dist.get_world_size()} ranks")

    def mesh(**axes: int) -> DeviceMesh:
        return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    copies = {"replicate": dims.replicate} if dims.replicate > 1 else {}
    slices = {"tensor": dims.tensor} if dims.tensor > 1 else {}
    whole = mesh(**copies, shard=dims.fsdp, **slices)
    layers = whole[(*copies, "shard")] if slices else whole
    # What is whole on every tensor rank is sharded over these too.
    root = mesh(**copies, shard_tensor=dims.copy) if slices else layers
    context = expert = experts = None
    if dims.context > 1:
        context = mesh(data=dims.data_parallel, context=dims.context, **slices)["context"]
    if dims.expert > 1:
        spread = mesh(**copies, expert_shard=dims.expert_shard, expert=dims.expert, **slices)
        expert = spread[("expert", *slices)]
        experts = spread[(*copies, "expert_shard")]
    return Meshes(dims, layers, root, whole["tensor"] if slices else None, context, expert, experts)
