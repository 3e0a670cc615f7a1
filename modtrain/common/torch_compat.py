"""What versions of torch from 2.11 to 2.15 do not have in common, in one place.

Each name here says from which version torch has it, and what stands in for it before. Found by
asking torch where it can tell, not by its version: nightly builds and vendors' builds differ from
their numbers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.checkpoint import metadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupName
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion


def _all_gather_chunks(x: Tensor, dim: int, group: GroupName) -> Tensor:
    # By the first dim, then reordered: `torch.compile` cannot trace how torch 2.11 gathers by
    # another.
    gathered = collectives.all_gather_tensor(x, 0, group)
    return torch.cat(gathered.tensor_split(len(gathered) // len(x)), dim)


# torch 2.13 renamed these two; the old names warn since then.
all_gather_single: Callable[[Tensor, int, GroupName], Tensor] = getattr(
    collectives, "all_gather_single", _all_gather_chunks
)
"""Gather a tensor of all ranks along a dim; asynchronous where torch can, traceable."""

reduce_scatter_single: Callable[[Tensor, str, int, GroupName], Tensor] = (
    getattr(collectives, "reduce_scatter_single", None) or collectives.reduce_scatter_tensor
)
"""Reduce a tensor over the ranks, return this rank's part along a dim; asynchronous."""

HAS_ISOLATED_RECOMPILES = "isolate_recompiles" in inspect.signature(torch.compile).parameters
"""Whether each `torch.compile` call has a limit of graphs of its own (torch 2.13)."""


try:
    from torch.distributed.fsdp._fully_shard._fsdp_common import (
        FSDPMeshInfo,
        HSDPMeshInfo,
        ShardPlacementResult,
    )

    HAS_PARAMETER_MESHES = True
except ImportError:
    HAS_PARAMETER_MESHES = False
"""Whether FSDP2 shards parameters of one group over different meshes (torch 2.12)."""


def shard_over(mesh: DeviceMesh) -> Callable[[int], Any]:
    """Return what turns a dim into an answer of `fully_shard`'s ``shard_placement_fn``.

    The parameter is then sharded by this dim over ``mesh``, whatever the mesh of its group is.

    mesh: 1-D, or (replicate, shard).

    Raises:
        RuntimeError: this torch cannot; `modtrain.parallel.validation` refuses it at start.
    """
    if not HAS_PARAMETER_MESHES:
        raise RuntimeError(f"torch {torch.__version__} cannot shard experts over their own mesh")
    # The same object each time: FSDP groups parameters by it.
    info = (
        FSDPMeshInfo(mesh=mesh, shard_mesh_dim=0)
        if mesh.ndim == 1
        else HSDPMeshInfo(mesh=mesh, shard_mesh_dim=1, replicate_mesh_dim=0)
    )
    return lambda dim: ShardPlacementResult(Shard(dim), info)


class TensorProperties(metadata.TensorProperties):
    """A tensor's properties in a checkpoint's metadata, as far as this torch knows them.

    torch 2.15 wrote strides after what older versions read.
    """

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Read the fields that this torch has; earlier ones mean the same in every version."""
        super().__setstate__(state[: len(fields(metadata.TensorProperties))])  # type: ignore[no-untyped-call]


def ddp_buffer_options() -> dict[str, Any]:
    """Return options of `DistributedDataParallel` that leave buffers alone in forward.

    Before torch 2.13 the option is ``broadcast_buffers``, which also leaves out the broadcast at
    its start: buffers are the same on all ranks there, as initialized or as loaded.
    """
    parameters = inspect.signature(DistributedDataParallel).parameters
    is_new = "forward_sync_buffers" in parameters
    return {"forward_sync_buffers" if is_new else "broadcast_buffers": False}


def compile_options(recompile_limit: int) -> dict[str, Any]:
    """Return options of `torch.compile` for one that may make ``recompile_limit`` graphs.

    Graphs of other models in the process do not count against the limit. Before torch 2.13 the
    limit is one for the process: it is raised there, and graphs of others do count.

    What was compiled wrongly before torch 2.14 is mended as well; see `keep_mutation_order`.
    """
    # By its version, for torch cannot tell; done where it is not needed, it changes nothing.
    if TorchVersion(torch.__version__) < "2.14":
        keep_mutation_order()
    if HAS_ISOLATED_RECOMPILES:
        return {"recompile_limit": recompile_limit, "isolate_recompiles": True}
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 8 * recompile_limit)
    return {}


@functools.cache
def keep_mutation_order() -> None:
    """Let a kernel on the CPU read a buffer after what writes it in place, as in torch 2.14.

    Where Inductor fits the loops of two kernels to each other to fuse them, which it does for the
    CPU alone, it finds their reads anew and forgets the order of writes and reads in place
    (https://github.com/pytorch/pytorch/pull/185873). A kernel could then read what a collective
    gathers before the wait for it: losses were wrong, another time others, without an error.
    """
    # The compiler takes seconds to import: by those alone who compile.
    from torch._inductor import dependencies, scheduler  # noqa: PLC0415

    node_class: Any = scheduler.SchedulerNode
    recompute = node_class.recompute_size_and_body

    @functools.wraps(recompute)
    def recompute_and_keep(node: Any, *args: Any, **options: Any) -> None:
        reads = node.read_writes.reads
        kinds = (dependencies.StarDep, dependencies.WeakDep)
        order = type(reads)(dep for dep in reads if isinstance(dep, kinds))
        recompute(node, *args, **options)
        reads_writes = node.read_writes.with_read(order)
        node.set_read_writes(reads_writes.rename(node.mutation_renames))

    node_class.recompute_size_and_body = recompute_and_keep
    # A graph that was compiled without this is not taken from the cache.
    torch.compiler.config.cache_key_tag += "mutation order kept"
