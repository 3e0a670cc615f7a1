"""Expert parallelism: a layer's experts spread over ranks, and rows that travel to them and back.

The ranks of an ``expert`` group share the experts, each holding E / R of them; ranks with the same
ones shard them (FSDP2). An expert group is made of data- and context-parallel ranks: each has
tokens of its own. Where matrices are sliced (tensor parallel) before, so are each expert's here.

Rows of no-op experts and of padding stay where they are. A training step sends each of the others
four times: there and back, and its gradients likewise; full activation checkpointing sends half as
much again, selective keeps what came. `benchmarks._traffic.sent_bytes` counts them.

- Static shapes (experts with a capacity, in training): all ranks send as much to all, and nothing
  is read on the host. Every rank's batch has to have the same shape.
- Dropless: how many rows come from where is known only then. Counts travel first, and the host
  reads them, once a layer: it waits for the device there, compiled or not.

Shapes: M rows of this rank, N rows that it receives, D model, W width of an expert, E experts,
R ranks that share them, L = E / R experts of a rank, C rows of each expert from each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _resolve_process_group
from torch._subclasses.fake_tensor import is_fake
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupName
from torch.distributed.tensor import DTensor, Placement, Shard

from modtrain.distributed.collectives import Group, cast_for_autocast, local_tensor, scale_grad
from modtrain.models.experts.layer import ExpertMLPs, Experts
from modtrain.parallel.swap import swap_class


def apply_expert_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leave each rank its own experts of every mixture, and let rows travel to them.

    The matrices become DTensors, Shard(0) over the ``expert`` axis, under the names that they had.
    All ranks have to hold equal weights. An expert's gradient, a sum over the rows of all ranks of
    the group, is divided by their number: FSDP's mean over the ranks that hold the same experts
    then makes it a mean over all ranks, as every other gradient.

    mesh: (expert,), or (expert, tensor) where the matrices are sliced over ``tensor``. The numbers
    have to fit: see `modtrain.parallel.validation.expert_problems`.
    """
    group = Group.of(mesh["expert"] if mesh.ndim > 1 else mesh)
    for module in model.modules():
        if isinstance(module, Experts):
            spread_experts(module.inner, mesh, group)


def spread_experts(experts: ExpertMLPs, mesh: DeviceMesh, group: Group) -> None:
    """Leave this rank its own of ``experts``, in place."""
    for name, weight in experts.named_parameters():
        # A copy: a view would keep the memory of all experts.
        own = local_tensor(weight).detach().chunk(group.size)[group.rank].clone()
        slices = weight.placements if isinstance(weight, DTensor) else ()
        placements: list[Placement] = [Shard(0), *slices]
        spread = DTensor.from_local(own, mesh, placements, run_check=False)
        setattr(experts, name, nn.Parameter(spread, weight.requires_grad))
    swap_class(experts, ExpertParallelMLPs, expert_group=group)


class ExpertParallelMLPs(ExpertMLPs):
    """The experts' matrices where each rank has L of the E: rows go to their experts and return.

    Takes and gives what `ExpertMLPs` does. Collective over the ranks that share the experts: each
    has to call it as often, and go backward through it.
    """

    expert_group: Group

    def forward(self, x_MD: Tensor, offsets_E: Tensor | None) -> Tensor:
        """See `ExpertMLPs.forward`."""
        x_MD = cast_for_autocast(x_MD)
        if offsets_E is None:
            return self._forward_even(x_MD)
        return self._forward_uneven(x_MD, offsets_E)

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the matrices of this rank's experts, (L, D, W) and (L, W, D)."""
        gate = None if self.gate is None else self._own(self.gate)
        return self._own(self.up), gate, self._own(self.down)

    def _own(self, weight: Tensor) -> Tensor:
        return scale_grad(local_tensor(weight), 1 / self.expert_group.size)

    def _forward_even(self, x_MD: Tensor) -> Tensor:
        (rows, dim), (name, size, _) = x_MD.shape, self.expert_group
        even, own = [rows // size] * size, self.up.shape[0] // size
        x_RLCD = exchange(x_MD, even, even, rows, name).view(size, own, -1, dim)
        y_ND = super().forward(x_RLCD.transpose(0, 1).flatten(0, 2), None)
        y_RLCD = y_ND.view(own, size, -1, dim).transpose(0, 1)
        return exchange(y_RLCD.flatten(0, 2), even, even, rows, name)

    def _forward_uneven(self, x_MD: Tensor, offsets_E: Tensor) -> Tensor:
        rows, (name, size, _) = x_MD.shape[0], self.expert_group
        sent_RL = offsets_E.long().diff(prepend=offsets_E.new_zeros(1)).view(size, -1)
        ones = [1] * size
        received_RL = exchange(sent_RL, ones, ones, size, name)
        sent, received = _sizes(sent_RL, received_RL, rows)
        x_ND = exchange(x_MD, received, sent, sum(received), name)
        # They come sorted by rank, then expert; grouped products want them sorted by expert.
        place_N = by_expert(received_RL, x_ND.shape[0])
        x_ND = torch.empty_like(x_ND).index_copy(0, place_N, x_ND)
        y_ND = super().forward(x_ND, received_RL.sum(0).cumsum(0).int()).index_select(0, place_N)
        return exchange(y_ND, sent, received, rows, name)


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
