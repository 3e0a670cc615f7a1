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

from modtrain.distributed.watchdog import Watch

# Plans of so many ranks are merged, and what they come to is scaled.
_MERGED = 16


class SaveCost(NamedTuple):
    """What a save costs beside the tensors.

    entries: parts of tensors that all ranks write, each with its line in the metadata. told: bytes
    of plans that rank 0 receives before anything is written. metadata: bytes of the file that says
    where each part lies; every rank reads it whole where a run goes on.
    """

    entries: int
    told: int
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


class BoardCost(NamedTuple):
    """Requests of one rank to the store that all share.

    beat: each time that it reports. failure: when a collective broke, to learn whose fault it was,
    where all have said so by then.
    """

    beat: int
    failure: int


def board_cost(world_size: int) -> BoardCost:
    """Return what the board costs one of ``world_size`` ranks."""
    store = _CountedStore()
    # A beat comes as it starts, and the next one much later.
    watch = Watch(store, 1, world_size, 600.0, None)  # type: ignore[arg-type]
    watch.close()
    beat = store.requests.total()
    told = json.dumps([0, "failed", "host", "text"])
    store.board.set("blame", told)
    for rank in range(world_size):
        store.board.set(f"post/{rank}", told)
        store.board.set(f"seen/{rank}", json.dumps(["host", "step 1", 0.0, 1]))
    store.requests.clear()
    watch.explain(RuntimeError("a collective broke"))
    return BoardCost(beat, store.requests.total())


class _CountedStore:
    """A store that counts what it is asked."""

    def __init__(self) -> None:
        self.board, self.requests = HashStore(), Counter[str]()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.board, name)

        def asked(*args: Any) -> Any:
            self.requests[name] += 1
            return method(*args)

        return asked
