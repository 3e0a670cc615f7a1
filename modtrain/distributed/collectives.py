"""What the ranks of a group exchange within a layer, with the gradient that each exchange has.

Tensor, context and expert parallelism are made of it. The last rank's chunk of a sequence may end
in padding: a sequence of any length can be split.

Shapes: B batch, S sequence, D model, n ranks of the group, L = ceil(S / n).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupName
from torch.distributed.tensor import DTensor

from modtrain.common.torch_compat import all_gather_single, reduce_scatter_single


class Group(NamedTuple):
    """The ranks that compute a layer together, and their collectives."""

    name: GroupName
    size: int
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Group:
        """Return this rank's group of a 1-D mesh."""
        return cls(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())

    # Differentiable.

    def scatter_seq(self, x_BSD: Tensor) -> Tensor:
        """Take this rank's chunk (B, L, D) of what all have; the gradient is gathered."""
        gather = partial(self.all_gather, length=x_BSD.shape[1])
        return _exchange(x_BSD, self.local_seq_chunk, gather)

    def gather_seq(self, x_BLD: Tensor, length: int) -> Tensor:
        """Gather the chunks (B, S, D); of the gradient, equal on all ranks, take the chunk."""
        gather = partial(self.all_gather, length=length)
        return _exchange(x_BLD, gather, self.local_seq_chunk)

    def gather_seq_sum_grad(self, x_BLD: Tensor, length: int) -> Tensor:
        """Gather the chunks (B, S, D); the ranks' gradients, which differ, are summed."""
        return _exchange(x_BLD, partial(self.all_gather, length=length), self.reduce_scatter)

    def reduce_scatter_seq(self, x_BSD: Tensor) -> Tensor:
        """Sum over the ranks and keep this rank's chunk (B, L, D); the gradient is gathered."""
        gather = partial(self.all_gather, length=x_BSD.shape[1])
        return _exchange(x_BSD, self.reduce_scatter, gather)

    def copy_sum_grad(self, x: Tensor) -> Tensor:
        """Return ``x`` as it is; the ranks' gradients, which differ, are summed."""
        return _exchange(x, _identity, self.all_reduce)

    def sum_copy_grad(self, x: Tensor) -> Tensor:
        """Sum over the ranks; the gradient, equal on all ranks, stays as it is."""
        return _exchange(x, self.all_reduce, _identity)

    def scale_grad(self, x: Tensor) -> Tensor:
        """Return ``x`` as it is; its gradient times n, so that a mean over ranks is a sum."""
        return scale_grad(x, self.size)

    # Not differentiable.

    def local_seq_chunk(self, x_BSD: Tensor, fill: float = 0) -> Tensor:
        """Take this rank's chunk of the sequence (B, L, ...), ``fill`` behind the last token."""
        chunk = -(-x_BSD.shape[1] // self.size)
        padded = pad_to_multiple(x_BSD, self.size, fill)
        return _copy_of_chunk(padded, self.rank * chunk, chunk)

    def all_gather(self, x_BLD: Tensor, length: int) -> Tensor:
        """Return the chunks one behind another (B, S, D)."""
        x_BSD = _wait(all_gather_single(x_BLD.contiguous(), 1, self.name))
        return x_BSD if length == x_BSD.shape[1] else _copy_of_chunk(x_BSD, 0, length)

    def reduce_scatter(self, x_BSD: Tensor) -> Tensor:
        """Return this rank's chunk (B, L, D) of the sum over the ranks."""
        x = pad_to_multiple(x_BSD, self.size).contiguous()
        return _wait(reduce_scatter_single(x, "sum", 1, self.name))

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        return _wait(collectives.all_reduce(x.contiguous(), "sum", self.name))


def local_tensor(x: Tensor) -> Tensor:
    """Return this rank's part of a DTensor; a plain tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def scale_grad(x: Tensor, factor: float) -> Tensor:
    """Return ``x`` as it is; its gradient is multiplied by ``factor``."""
    return _exchange(x, _identity, partial(torch.mul, other=factor))


def pad_to_multiple(x_BSD: Tensor, multiple: int, fill: float = 0) -> Tensor:
    """Put ``fill`` behind the last token until the sequence's length is a multiple."""
    missing = -x_BSD.shape[1] % multiple
    if not missing:
        return x_BSD
    return F.pad(x_BSD, (0, 0) * (x_BSD.ndim - 2) + (0, missing), value=fill)


def cast_for_autocast(x: Tensor) -> Tensor:
    """Cast to autocast's type before sending: bf16 halves what travels."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        forward: Callable[[Tensor], Tensor],
        backward: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.apply_backward = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.apply_backward(gradient), None, None


def _exchange(
    x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]
) -> Tensor:
    output: Tensor = _Exchange.apply(x, forward, backward)  # type: ignore[no-untyped-call]
    return output


def _identity(x: Tensor) -> Tensor:
    return x.view_as(x)


def _copy_of_chunk(x_BSD: Tensor, start: int, length: int) -> Tensor:
    # Contiguous, but never a view, as one sequence's chunk would be: torch 2.11 compiles the
    # gradient of an autograd function that returns a view to zero.
    return x_BSD.narrow(1, start, length).clone(memory_format=torch.contiguous_format)


def _wait(x: Tensor) -> Tensor:
    output: Tensor = collectives.wait_tensor(x)  # type: ignore[no-untyped-call]
    return output
