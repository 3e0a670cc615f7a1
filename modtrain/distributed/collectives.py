"""What the ranks of a group exchange within a layer, with the gradient that each exchange has.

Tensor and context parallelism are made of it. The last rank's share of a sequence may end in
padding: any number of tokens goes.

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


class Group(NamedTuple):
    """The ranks that have a layer's work between them, and what they tell each other."""

    name: GroupName
    size: int
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Group:
        """Return this rank's group of a 1-D mesh."""
        return cls(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())

    def cut(self, x_BSD: Tensor) -> Tensor:
        """Whole to share (B, L, D); the gradient is gathered."""
        return _exchanged(x_BSD, self.own_share, partial(self.gathered, length=x_BSD.shape[1]))

    def join(self, x_BLD: Tensor, length: int) -> Tensor:
        """Shares to whole (B, S, D); of the gradient, which all ranks have alike, the share."""
        return _exchanged(x_BLD, partial(self.gathered, length=length), self.own_share)

    def spread(self, x_BLD: Tensor, length: int) -> Tensor:
        """The same, for what each rank makes a part of the result of: gradients are summed."""
        return _exchanged(x_BLD, partial(self.gathered, length=length), self.scattered)

    def collect(self, x_BSD: Tensor) -> Tensor:
        """Parts of a sum to this rank's share of it (B, L, D); the gradient is gathered."""
        return _exchanged(x_BSD, self.scattered, partial(self.gathered, length=x_BSD.shape[1]))

    def each(self, x: Tensor) -> Tensor:
        """As it is, for what each rank makes a part of the result of: gradients are summed."""
        return _exchanged(x, _same, self.summed)

    def total(self, x: Tensor) -> Tensor:
        """Parts of a sum to the sum; all ranks have its gradient alike."""
        return _exchanged(x, self.summed, _same)

    def counted(self, x: Tensor) -> Tensor:
        """As it is; a gradient that is a part of a sum counts n times, for a mean over ranks."""
        return _exchanged(x, _same, partial(torch.mul, other=self.size))

    def own_share(self, x_BSD: Tensor, fill: float = 0) -> Tensor:
        """Take this rank's share of the sequence (B, L, ...), ``fill`` behind the last token."""
        share = -(-x_BSD.shape[1] // self.size)
        return lengthened(x_BSD, self.size, fill).narrow(1, self.rank * share, share).contiguous()

    def gathered(self, x_BLD: Tensor, length: int) -> Tensor:
        """Return the shares one behind another (B, S, D)."""
        x = collectives.all_gather_single(x_BLD.contiguous(), 1, self.name)
        return _arrived(x).narrow(1, 0, length).contiguous()

    def scattered(self, x_BSD: Tensor) -> Tensor:
        """Return this rank's share (B, L, D) of the sum over the ranks."""
        x = lengthened(x_BSD, self.size).contiguous()
        return _arrived(collectives.reduce_scatter_single(x, "sum", 1, self.name))

    def summed(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        return _arrived(collectives.all_reduce(x.contiguous(), "sum", self.name))


def lengthened(x_BSD: Tensor, multiple: int, fill: float = 0) -> Tensor:
    """Put ``fill`` behind the last token until the sequence's length is a multiple."""
    missing = -x_BSD.shape[1] % multiple
    if not missing:
        return x_BSD
    return F.pad(x_BSD, (0, 0) * (x_BSD.ndim - 2) + (0, missing), value=fill)


def as_multiplied(x: Tensor) -> Tensor:
    """Cast as the products behind would, before it travels: in bf16 half as much does."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None


def _exchanged(
    x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
) -> Tensor:
    found: Tensor = _Exchange.apply(x, there, back)  # type: ignore[no-untyped-call]
    return found


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def _arrived(x: Tensor) -> Tensor:
    found: Tensor = collectives.wait_tensor(x)  # type: ignore[no-untyped-call]
    return found
