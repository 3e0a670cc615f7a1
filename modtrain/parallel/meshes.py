"""Which ranks do what together: the axes of a run's processes, by strategy.

Neighbours share a group wherever groups are small: the ranks of one node have neighbouring numbers,
and tensor, expert and shard groups are what needs the fastest links.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = {
    "fsdp": ("data",),
    "hsdp": ("replicate", "shard"),
    "fsdp_tp": ("data", "tensor"),
    "fsdp_ep": ("expert_data", "expert"),
    "fsdp_cp": ("data", "context"),
}
"""The strategies whose parameters lie in pieces on the ranks, and the axes of each one's mesh."""


@dataclass(frozen=True)
class Meshes:
    """The ranks' meshes: made once in a run, for making them is collective.

    whole: all ranks, with the strategy's `AXES`.
    data_size, data_rank: how many ranks read different data, and which of them this one is. The
        ranks of one tensor-parallel or context-parallel group read the same.
    layers: what FSDP cuts the matrices of a layer over, experts under fsdp_ep left out; 1-D, or
        (replicate, shard).
    rest: what it cuts everything else over: all ranks, 1-D or (replicate, shard).
    """

    whole: DeviceMesh
    data_size: int
    data_rank: int
    layers: DeviceMesh
    rest: DeviceMesh

    @property
    def tensor(self) -> DeviceMesh:
        """The group whose ranks have slices of each matrix. Raises KeyError without such groups."""
        return self.whole["tensor"]

    @property
    def context(self) -> DeviceMesh:
        """The group whose ranks have shares of a sequence. Raises KeyError without such groups."""
        return self.whole["context"]


def make_meshes(
    strategy: str,
    world_size: int,
    tensor_parallel: int = 1,
    expert_parallel: int = 1,
    shard_size: int | None = None,
    device_type: str = "cpu",
    context_parallel: int = 1,
) -> Meshes:
    """Make the meshes of all ranks; collective, and the same on each of them.

    tensor_parallel, expert_parallel, context_parallel: ranks of a group of fsdp_tp, fsdp_ep,
    fsdp_cp; other strategies leave them alone. shard_size: ranks of hsdp that share one copy of the
    model; None: all.

    Raises:
        ValueError: ``strategy`` has no meshes, or a group does not divide the ranks.
    """
    if strategy not in AXES:
        raise ValueError(f"{strategy} has no meshes; {', '.join(AXES)} have")
    inner = {
        "fsdp": 1,
        "hsdp": shard_size or world_size,
        "fsdp_tp": tensor_parallel,
        "fsdp_ep": expert_parallel,
        "fsdp_cp": context_parallel,
    }[strategy]
    if inner < 1 or world_size % inner:
        raise ValueError(f"groups of {inner} do not divide {world_size} ranks")
    outer, rank = world_size // inner, dist.get_rank()
    axes = AXES[strategy]
    shape = (outer, inner)[: len(axes)]
    whole = init_device_mesh(device_type, shape, mesh_dim_names=axes)
    if strategy in ("fsdp", "hsdp"):
        return Meshes(whole, world_size, rank, whole, whole)
    everyone = init_device_mesh(device_type, (world_size,), mesh_dim_names=("everyone",))
    if strategy == "fsdp_tp":
        return Meshes(whole, outer, rank // inner, whole["data"], everyone)
    if strategy == "fsdp_cp":
        return Meshes(whole, outer, rank // inner, everyone, everyone)
    return Meshes(whole, world_size, rank, everyone, everyone)
