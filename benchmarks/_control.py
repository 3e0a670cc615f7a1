"""What the ranks of a run tell each other beside training: checkpoints, and the board of failures.

Counted with the code that does it, on stores and plans that are there, without the ranks.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from modtrain.distributed.watchdog import Watchdog

# Plans of so many ranks are merged, and what they come to is scaled.
_MERGED = 16


class SaveCost(NamedTuple):
    """What a save costs beside the tensors.

    entries: parts of tensors that all ranks write, each with its line in the metadata.
    plan_bytes: bytes of plans that rank 0 receives before anything is written. metadata: bytes of
    the file that says where each part lies; every rank reads it whole when a run resumes.
    """

    entries: int
    plan_bytes: int
    metadata: int


def save_cost(items: Sequence[WriteItem], world_size: int) -> SaveCost:
    """Return what a save by ``world_size`` ranks costs, each of which writes about ``items``."""
    plan = len(pickle.dumps(SavePlan(list(items))))
    merged = [SavePlan([_of_rank(item, rank) for item in items]) for rank in range(_MERGED)]
    _, metadata = create_default_global_save_plan(merged)
    metadata.storage_data = {
        item.index: _StorageInfo(f"__{rank}_0.distcp", number, number)
        for rank, own in enumerate(merged)
        for number, item in enumerate(own.items)
    }
    file = len(pickle.dumps(metadata)) * world_size // _MERGED
    return SaveCost(len(items) * world_size, plan * (world_size - 1), file)


def _of_rank(item: WriteItem, rank: int) -> WriteItem:
    """Return what ``rank`` writes: the piece behind, or in place of a whole tensor another one."""
    data = item.tensor_data
    if data is None or item.type is not WriteItemType.SHARD:
        return replace(item, index=replace(item.index, fqn=f"{item.index.fqn}.{rank}"))
    offsets = torch.Size([rank * data.chunk.sizes[0], *data.chunk.offsets[1:]])
    moved = replace(data, chunk=replace(data.chunk, offsets=offsets))
    return replace(item, index=MetadataIndex(item.index.fqn, offsets), tensor_data=moved)


class StoreCost(NamedTuple):
    """Requests of one rank to the store that all share.

    heartbeat: for one. failure: when a collective broke, to learn which rank failed, where all have
    published their failures by then.
    """

    heartbeat: int
    failure: int


def store_cost(world_size: int) -> StoreCost:
    """Return what the watchdog's store costs one of ``world_size`` ranks."""
    store = _CountedStore()
    # One heartbeat comes at the start, and the next one much later.
    watchdog = Watchdog(store, 1, world_size, 600.0, None)  # type: ignore[arg-type]
    watchdog.close()
    heartbeat = store.requests.total()
    report = json.dumps([0, "failed", "host", "text"])
    store.store.set("first_failure", report)
    for rank in range(world_size):
        store.store.set(f"failure/{rank}", report)
        store.store.set(f"heartbeat/{rank}", json.dumps(["host", "step 1", 0.0, 1]))
    store.requests.clear()
    watchdog.find_cause(RuntimeError("a collective broke"))
    return StoreCost(heartbeat, store.requests.total())


class _CountedStore:
    """A store that counts what it is asked."""

    def __init__(self) -> None:
        self.store, self.requests = HashStore(), Counter[str]()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.store, name)

        def counted(*args: Any) -> Any:
            self.requests[name] += 1
            return method(*args)

        return counted
