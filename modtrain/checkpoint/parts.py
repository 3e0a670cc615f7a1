"""Which part of which tensor a rank writes, and the host copies that are written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Part:
    """A rectangular part of a tensor that this rank writes.

    item: its place in the whole tensor, for torch.distributed.checkpoint. tensor: its values, local
    and plain.
    """

    item: WriteItem
    tensor: Tensor


def parts_of(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> list[Part]:
    """Return the parts that ``rank`` writes; each element of each tensor belongs to one rank.

    Replicated tensors are distributed over the ranks that have them, the largest first, so under
    data parallelism a rank copies and writes its share only. Every rank must pass the same names
    and shapes: plain tensors that are the same everywhere, or DTensors.

    Raises:
        ValueError: a DTensor has a partial placement.
    """
    order = sorted(tensors, key=lambda key: (-tensors[key].numel(), key))
    parts = []
    for number, key in enumerate(order):
        tensor = tensors[key].detach()
        part = None
        if isinstance(tensor, DTensor):
            part = _of_dtensor(key, tensor, number)
        elif number % world_size == rank:
            part = whole_part(key, tensor)
        if part is not None:
            parts.append(part)
    return parts


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of names, shapes and dtypes."""
    lines = sorted(f"{key} {tuple(t.shape)} {t.dtype}" for key, t in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def whole_part(key: str, tensor: Tensor) -> Part:
    """Return a whole tensor as one part, which no other rank writes."""
    return _part(key, tensor, (0,) * tensor.ndim, tensor.shape, WriteItemType.TENSOR)


def _of_dtensor(key: str, tensor: DTensor, number: int) -> Part | None:
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"{key} is not reduced over {tensor.device_mesh}")
    copy, copies = 0, 1
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            copy = copy * tensor.device_mesh.size(axis) + coordinate[axis]
            copies *= tensor.device_mesh.size(axis)
    if number % copies != copy:
        return None
    sizes, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    # Uneven shards leave nothing for some ranks.
    if prod(sizes) == 0 and tensor.numel() > 0:
        return None
    return _part(key, tensor.to_local(), offsets, tensor.shape, WriteItemType.SHARD)


def _part(
    key: str, tensor: Tensor, offsets: Iterable[int], size: torch.Size, kind: WriteItemType
) -> Part:
    box = ChunkStorageMetadata(torch.Size(offsets), tensor.shape)
    properties = replace(TensorProperties.create_from_tensor(tensor), pin_memory=False)
    index = MetadataIndex(key, box.offsets)
    written = TensorWriteData(box, properties, size)
    return Part(WriteItem(index, kind, tensor_data=written), tensor)


class Staging:
    """Host memory that parts are copied to, reused from save to save."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, parts: list[Part], ready: torch.Event | None = None) -> list[Part]:
        """Return ``parts`` with copies in host memory, which the next call overwrites.

        ready: the event after which the values are final, from `ready_event`. The copies run on
        a stream of their own, concurrently with other work of the device.
        """
        self._buffers = copies = {part.item.index.fqn: self._buffer(part) for part in parts}

        def copy_all(non_blocking: bool) -> None:
            for part in parts:
                copies[part.item.index.fqn].copy_(part.tensor, non_blocking=non_blocking)

        if ready is None:
            copy_all(non_blocking=False)
        else:
            stream = torch.Stream(device_of(parts))
            stream.wait_event(ready)
            with stream:
                copy_all(non_blocking=True)
            stream.synchronize()
        return [replace(part, tensor=copies[part.item.index.fqn]) for part in parts]

    def _buffer(self, part: Part) -> Tensor:
        known, tensor = self._buffers.get(part.item.index.fqn), part.tensor
        if known is not None and known.shape == tensor.shape and known.dtype == tensor.dtype:
            return known
        # CUDA copies asynchronously to pinned memory only.
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def ready_event(parts: list[Part]) -> torch.Event | None:
    """Return a CUDA event after the work enqueued so far; None if no part is on CUDA.

    The thread that copies waits for it on a stream of its own.
    """
    device = device_of(parts)
    if device is None or device.type != "cuda":
        return None
    event = torch.Event(device)
    event.record(torch.accelerator.current_stream(device))
    return event


def device_of(parts: list[Part]) -> torch.device | None:
    """Return the device of the parts; None if all are on the host."""
    return next((part.tensor.device for part in parts if not part.tensor.is_cpu), None)
