"""Expert parallelism: a layer's experts spread over ranks, and rows that travel to them and back.

The ranks of an ``expert`` mesh share the experts, each holding E / R of them; those of an
``expert_data`` mesh hold the same ones, in parts (FSDP2). Every rank reads data of its own: both
are data-parallel to the rest of the model. `parallelize.fsdp_ep` puts it together.

Rows of no-op experts and of nobody stay where they are. A training step sends each of the others
four times: there and back, and its gradients likewise; see `sent_bytes`.

- Static shapes (experts with a capacity, in training): all ranks send as much to all, and nothing
  is read on the host. Every rank's batch has to have the same shape.
- Dropless: how many rows come from where is known only then. Counts travel first, and the host
  reads them, once a layer: it waits for the device there, compiled or not.

Shapes: M rows of this rank, N rows that it receives, D model, W width of an expert, E experts,
R ranks that share them, L = E / R experts of a rank, C rows of each expert from each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _resolve_process_group
from torch._subclasses.fake_tensor import is_fake
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupName
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import DTensor, Shard

from modtrain.common.errors import Problem, raise_if_any
from modtrain.distributed.collectives import as_multiplied
from modtrain.models.experts.layer import ExpertMLPs, Experts

Placement = Callable[[nn.Parameter], Shard | ShardPlacementResult | None]


def shard_experts(model: nn.Module, expert: DeviceMesh, expert_data: DeviceMesh) -> None:
    """Leave each rank its own experts of every mixture, and let rows travel to them.

    The matrices become DTensors, Shard(0) over the 1-D mesh ``expert``, under the names that they
    had. All ranks have to hold equal weights. An expert's gradient is then the sum over the ranks
    that share the experts: FSDP still has to make a mean of it, as `average` tells it to.

    Where ``expert`` has one rank nothing changes, and experts are like any other matrices.

    Raises:
        ConfigError: the experts cannot be split so.
    """
    raise_if_any(problems(model, expert.size(), expert_data.size()))
    for mixture in _mixtures(model):
        if expert.size() > 1 and not isinstance(mixture.inner, SpreadMLPs):
            mixture.inner = SpreadMLPs(mixture.inner, expert)


def placement(expert_data: DeviceMesh, other: Placement) -> Placement:
    """Tell FSDP to cut matrices of spread experts over ``expert_data``; the rest as ``other`` says.

    They belong to the group of their layer, and are gathered with it: no hook stands within the
    layer's graph.
    """
    # The same object each time: FSDP groups parameters by it.
    mesh = FSDPMeshInfo(mesh=expert_data, shard_mesh_dim=0)

    def place(weight: nn.Parameter) -> Shard | ShardPlacementResult | None:
        if not isinstance(weight, DTensor):
            return other(weight)
        # Dim 0 is the experts'; of the others only even parts are possible.
        dim = 1 if weight.shape[1] % expert_data.size() == 0 else 2
        return ShardPlacementResult(Shard(dim), mesh)

    return place


def average(layer: FSDPModule, expert_data: DeviceMesh, world_size: int) -> None:
    """Let the gradients of a layer, its spread experts' among them, be means over all ranks."""
    layer.set_gradient_divide_factor(float(world_size))
    if 1 < expert_data.size() < world_size:
        # NCCL could weigh the sum, gloo cannot. In a group of one torch 2.13 would divide twice.
        layer.set_force_sum_reduction_for_comms(True)


def problems(model: nn.Module, expert_size: int, data_size: int = 1) -> list[Problem]:
    """Say why the experts of ``model``, on any device, cannot be split over meshes of these sizes.

    expert_size: ranks that share the experts. data_size: ranks that hold parts of the same ones.
    """
    mixtures = _mixtures(model)
    if not mixtures:
        reason = "leaves expert parallelism nothing to spread: the model has no experts"
        return [Problem("model.experts.count", "null", reason, "set it, or use strategy=fsdp")]
    if expert_size == 1:
        return []
    found = []
    count, dim, width = mixtures[0].inner.up.shape
    if count % expert_size:
        fitting = [str(size) for size in range(1, min(count, expert_size) + 1) if not count % size]
        reason = f"does not divide model.experts.count={count}"
        remedy = f"use one of {', '.join(fitting)}, or another number of experts"
        found.append(Problem("strategy.expert_parallel", expert_size, reason, remedy))
    if dim % data_size and width % data_size:
        reason = (
            f"nor model.d_model={dim} can be cut evenly for the {data_size} ranks that hold parts"
            " of the same experts"
        )
        remedy = f"make one of the two a multiple of {data_size}, or raise strategy.expert_parallel"
        found.append(Problem("model.experts.dim", width, reason, remedy))
    return found


def sent_bytes(rows: float, d_model: int, itemsize: int, expert_size: int) -> float:
    """Bytes that a rank sends to others in a layer's training step, one rank's on average.

    Exact for static shapes; for dropless experts under an even load, where 8 bytes an expert of
    another rank come on top for the counts.

    rows: pairs of a token and a computing expert of one rank's micro-batch, slots that stay empty
    included (`ExpertsConfig.computed_slots` times sequences). itemsize: 2 under bf16 autocast, 4 in
    fp32. Full activation checkpointing sends half as much again: what went forward goes twice.
    Selective keeps what came, and sends nothing twice.
    """
    return 4 * rows * d_model * itemsize * (1 - 1 / expert_size)


class SpreadMLPs(ExpertMLPs):
    """The experts' matrices where each rank has L of the E: rows go to their experts and return.

    Takes and gives what `ExpertMLPs` does. Collective over the ranks that share the experts: each
    has to call it as often, and go backward through it.
    """

    def __init__(self, whole: ExpertMLPs, mesh: DeviceMesh) -> None:
        """Take this rank's experts of ``whole``; mesh: 1-D, of the ranks that share them."""
        nn.Module.__init__(self)  # no matrices of their own: they are whole's
        self.size, self.group = mesh.size(), mesh.get_group().group_name
        for name, weight in whole.named_parameters():
            self.register_parameter(name, _own_experts(weight, mesh))
        if whole.gate is None:
            self.gate = None

    def forward(self, x_MD: Tensor, offsets_E: Tensor | None) -> Tensor:
        """See `ExpertMLPs.forward`."""
        x_MD = as_multiplied(x_MD)
        if offsets_E is None:
            return self._forward_even(x_MD)
        return self._forward_uneven(x_MD, offsets_E)

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the matrices of this rank's experts, (L, D, W) and (L, W, D)."""
        gate = None if self.gate is None else _local(self.gate)
        return _local(self.up), gate, _local(self.down)

    def _forward_even(self, x_MD: Tensor) -> Tensor:
        rows, dim = x_MD.shape
        sizes = [rows // self.size] * self.size
        own = self.up.shape[0] // self.size
        x_RLCD = exchange(x_MD, sizes, sizes, rows, self.group).view(self.size, own, -1, dim)
        y_ND = super().forward(x_RLCD.transpose(0, 1).flatten(0, 2), None)
        y_RLCD = y_ND.view(own, self.size, -1, dim).transpose(0, 1)
        return exchange(y_RLCD.flatten(0, 2), sizes, sizes, rows, self.group)

    def _forward_uneven(self, x_MD: Tensor, offsets_E: Tensor) -> Tensor:
        rows = x_MD.shape[0]
        sent_RL = offsets_E.long().diff(prepend=offsets_E.new_zeros(1)).view(self.size, -1)
        ones = [1] * self.size
        received_RL = exchange(sent_RL, ones, ones, self.size, self.group)
        sent, received = _sizes(sent_RL, received_RL, rows)
        x_ND = exchange(x_MD, received, sent, sum(received), self.group)
        # They come sorted by rank, then expert; grouped products want them sorted by expert.
        place_N = by_expert(received_RL, x_ND.shape[0])
        x_ND = torch.empty_like(x_ND).index_copy(0, place_N, x_ND)
        y_ND = super().forward(x_ND, received_RL.sum(0).cumsum(0).int()).index_select(0, place_N)
        return exchange(y_ND, sent, received, rows, self.group)


def exchange(
    rows: Tensor, received: Sequence[int], sent: Sequence[int], total: int, group: str
) -> Tensor:
    """Send the first ``sent[0]`` rows to rank 0 of ``group``, the next to rank 1, and so on.

    Returns what the ranks sent here, ``received[r]`` rows of rank r, in the order of ranks, and
    behind them zeros up to ``total`` rows. Differentiable. group: a process group's name.
    """
    out: Tensor = _exchange(rows, received, sent, total, group)
    return out


# An operator of modtrain's, not torch's functional one: selective activation checkpointing keeps
# the results of these, and nothing is sent again in backward. What counts torch's collectives by
# their operators has to count this one as well.
@torch.library.custom_op("modtrain::exchange", mutates_args=())
def _exchange(
    rows: Tensor, received: Sequence[int], sent: Sequence[int], total: int, group: str
) -> Tensor:
    out = rows.new_empty(total, *rows.shape[1:])
    here = sum(received)
    out[here:] = 0
    dist.all_to_all_single(
        out[:here],
        rows[: sum(sent)].contiguous(),
        list(received),
        list(sent),
        group=_resolve_process_group(GroupName(group)),
    )
    return out


@_exchange.register_fake
def _(rows: Tensor, received: Sequence[int], sent: Sequence[int], total: int, group: str) -> Tensor:
    del received, sent, group
    return rows.new_empty(total, *rows.shape[1:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    rows, ctx.received, ctx.sent, _, ctx.group = inputs
    ctx.rows = rows.shape[0]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    back = exchange(gradient, ctx.sent, ctx.received, ctx.rows, ctx.group)
    return back, None, None, None, None


_exchange.register_autograd(_backward, setup_context=_save)


def by_expert(received_RL: Tensor, rows: int) -> Tensor:
    """Return where each of the received rows (N), sorted by rank, goes when sorted by expert.

    received_RL: how many came from each rank for each expert; ``rows`` in all.
    """
    runs = received_RL.flatten()
    starts = runs.cumsum(0) - runs
    sorted_LR = received_RL.t().flatten()
    new_starts = (sorted_LR.cumsum(0) - sorted_LR).view_as(received_RL.t()).t().flatten()
    number_N = torch.arange(rows, device=runs.device)
    run_N = torch.searchsorted(runs.cumsum(0), number_N, right=True)
    return number_N + (new_starts - starts).index_select(0, run_N)


def _sizes(sent_RL: Tensor, received_RL: Tensor, rows: int) -> tuple[list[int], list[int]]:
    """Read on the host how many rows go to each rank and come from it."""
    if not torch.compiler.is_compiling() and is_fake(sent_RL):
        # No numbers to read where only shapes are counted: as many as could go, evenly.
        even = [rows // len(sent_RL)] * len(sent_RL)
        return even, even
    sent, received = torch.stack([sent_RL.sum(1), received_RL.sum(1)]).tolist()
    return sent, received


def _mixtures(model: nn.Module) -> list[Experts]:
    return [module for module in model.modules() if isinstance(module, Experts)]


def _own_experts(weight: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    # A copy: a view would keep the memory of all experts.
    own = weight.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
    spread = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
    return nn.Parameter(spread, requires_grad=weight.requires_grad)


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight
