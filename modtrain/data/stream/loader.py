"""Batches from the samples of a data set: by workers, by threads, through shared memory."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from modtrain.common.errors import DataError
from modtrain.common.shared_memory import SHARED_MEMORY
from modtrain.data.mixture.stream import sources_of
from modtrain.data.remote.dataset import RemoteTokenDataset
from modtrain.data.remote.fill import ShardFiller
from modtrain.data.remote.read_ahead import ReadAhead
from modtrain.data.stream.batch import Batch

# For semaphores and whole pages.
SPARE_BYTES = 1 << 16
SHARED_MEMORY_REMEDY = (
    "data.num_workers=0 needs no shared memory, and docker run takes --shm-size=8g."
    " The same command continues from the last checkpoint."
)


class TokenLoader(DataLoader[Batch]):
    """A DataLoader whose workers' errors are the run's own.

    Without workers, batches from behind a URL are read by threads: the server is waited for.

    num_ahead: batches that these have read. filler: fetches whole shards meanwhile. consumed:
    samples of all ranks before the first batch, and in each. weight_of: computes the weight of a
    batch by its number, from 0; None: batches have none.
    """

    num_ahead = 1
    filler: ShardFiller | None = None
    consumed = (0, 0.0)
    _ahead: ReadAhead[list[int], Batch] | None = None
    weight_of: Callable[[int, Batch], float] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if self.filler is None:
            yield from self._weighted()
            return
        with self.filler as filler:
            yield from filler.watched(self._weighted(), *self.consumed, self._is_behind)

    def _is_behind(self) -> bool:
        return self._ahead is not None and self._ahead.is_behind

    def _weighted(self) -> Iterator[Batch]:
        if self.weight_of is None:
            yield from self._batches()
            return
        for number, batch in enumerate(self._batches()):
            yield batch._replace(weight=self.weight_of(number, batch))

    def _batches(self) -> Iterator[Batch]:
        data: Dataset[Any] = self.dataset
        numbers: Any = self.batch_sampler
        remote = [s.shards for _, s in sources_of(data) if isinstance(s, RemoteTokenDataset)]
        if self.num_workers == 0 and remote:

            def cancel(threads: Collection[int]) -> None:
                for shards in remote:
                    shards.files.cancel(threads)

            self._ahead = ReadAhead(self._read, iter(numbers), self.num_ahead, cancel)
            yield from self._ahead
            return
        try:
            yield from super().__iter__()
        except DataError as error:
            # A worker's error has its traceback before its text.
            text = re.split(r"\b(?:Data|Changed)Error: ", str(error))[-1]
            raise DataError(text.strip()) from error
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            free = f"{shutil.disk_usage(SHARED_MEMORY).free:,}" if SHARED_MEMORY.is_dir() else "no"
            raise DataError(
                f"the workers of data.num_workers={self.num_workers} gave no batch for"
                f" {self.timeout:.0f} s; {SHARED_MEMORY} has {free} bytes free."
                f" {SHARED_MEMORY_REMEDY}"
            ) from error

    def _read(self, numbers: list[int]) -> Batch:
        data: Any = self.dataset
        batch: Batch = self.collate_fn(data.__getitems__(numbers))
        return batch.pin_memory() if self.pin_memory else batch


def collate_tokens(tokens_BT: Tensor, eos_id: int | None, has_padding: bool) -> Batch:
    """Make a batch of sequences; raises DataError where shared memory is too small for it."""
    batch = Batch.from_tokens(tokens_BT, eos_id, has_padding=has_padding)
    if get_worker_info() is not None and SHARED_MEMORY.is_dir():
        # Where it is full, torch loses the batch and waits for it for ever.
        free = shutil.disk_usage(SHARED_MEMORY).free
        tensors = [tensor for tensor in batch[:4] if tensor is not None]
        needed = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        if free < needed + SPARE_BYTES:
            raise DataError(f"{SHARED_MEMORY} has {free:,} bytes free. {SHARED_MEMORY_REMEDY}")
    return batch
