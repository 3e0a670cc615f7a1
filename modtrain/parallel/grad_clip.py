"""The norm of gradients that lie in pieces on many ranks, and clipping by it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from modtrain.distributed.collectives import local_tensor


def clip(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Scale the gradients in place so that their norm is ``limit`` at most; return what it was.

    The norm is the Euclidean one over all the parameters whole, wherever their pieces are: plain
    tensors, which every rank has alike, and DTensors on any number of meshes. The same bits on all
    ranks, a 0-dim float32 tensor on the device; the host does not wait for it.

    limit: None leaves the gradients as they are. Collective where any parameter is a DTensor: one
    sum of one number over all ranks, whatever the meshes, all of which have to cover them.
    """
    parameters = list(parameters)
    norm = _norm(parameters)
    if limit is None:
        return norm
    # Operations on lists take the tensors of one mesh at a time.
    by_mesh: dict[object, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        by_mesh[getattr(parameter, "device_mesh", None)].append(parameter)
    for group in by_mesh.values():
        nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    is_apart = any(isinstance(parameter, DTensor) for parameter in parameters)
    world_size = dist.get_world_size() if is_apart else 1
    by_copies: dict[int, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            by_copies[world_size // _num_pieces(gradient)].append(local_tensor(gradient))
    device = parameters[0].device if parameters else torch.device("cpu")
    square = torch.zeros((), device=device)
    for copies, gradients in by_copies.items():
        square = square + nn.utils.get_total_norm(gradients).float().square() / copies
    if is_apart:
        dist.all_reduce(square)
    return square.sqrt()


def _num_pieces(gradient: Tensor) -> int:
    """Return how many different pieces there are; each rank has one of them."""
    if not isinstance(gradient, DTensor):
        return 1
    mesh = gradient.device_mesh
    return math.prod(
        mesh.size(axis)
        for axis, placement in enumerate(gradient.placements)
        if not placement.is_replicate()
    )
