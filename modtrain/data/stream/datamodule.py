"""The prepared data for Lightning: a stream that restarts at any step, and a fixed validation."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from modtrain.common.atomic_io import digest
from modtrain.common.errors import DataError
from modtrain.common.shared_memory import SHARED_MEMORY
from modtrain.data.config import DataConfig
from modtrain.data.mixture.order import MixtureOrder
from modtrain.data.mixture.stream import (
    MixtureDataset,
    load_indexes,
    open_split,
    order_of,
    sources_of,
)
from modtrain.data.remote.dataset import RemoteTokenDataset
from modtrain.data.remote.fill import ShardFiller, Upcoming, open_filler
from modtrain.data.remote.read_ahead import MOST_THREADS
from modtrain.data.remote.urls import is_url
from modtrain.data.stream.batch import Batch
from modtrain.data.stream.dataset import TokenDataset
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.loader import (
    SHARED_MEMORY_REMEDY,
    SPARE_BYTES,
    TokenLoader,
    collate_tokens,
)
from modtrain.data.stream.order import SampleOrder
from modtrain.data.stream.prepared import IndexSummary
from modtrain.data.stream.samplers import (
    BatchPlan,
    ChainedBatchSampler,
    EvalBatchSampler,
    RankBatchSampler,
    stream_positions,
)

_TOKEN_BYTES = 8
# Seconds for a batch. torch has no limit, and waits for ever for a batch that it loses where shared
# memory is full.
_WORKER_TIMEOUT = 600
# Of data behind a URL, within the time for a batch.
_REQUESTS = 10
# From behind a URL: optimizer steps whose batches lie ready, beside those that are requested at the
# moment and come together where the server is slow; and the bytes of all at most.
_STEPS_AHEAD = 16
_AHEAD_BYTES = 1 << 28


@dataclass(frozen=True)
class ValidPart:
    """Held-out batches of one source on this rank.

    counts: False if another rank has the same ones, because there are fewer than ranks.
    """

    batches: Iterator[Batch]
    counts: bool


class TokenDataModule(lightning.LightningDataModule):
    """Batches of int64 tokens for training and validation.

    The trainer must leave the sampler alone (``use_distributed_sampler=False``). World size and
    rank are those of the trainer's data-parallel ranks, 1 and 0 without a trainer.

    start_step: optimizer step at which training starts; set it before ``train_dataloader()``.
    skipped_samples: stretches of the stream that are not read, (first position, one behind the
    last), sorted and not touching; set them before as well.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        micro_batch_size: int,
        accumulate: int,
        num_steps: int,
        eval_batch_size: int,
        eval_sequences: int | None = None,
    ) -> None:
        """Nothing is read yet.

        micro_batch_size, accumulate: as in `BatchPlan`. num_steps: optimizer steps of the whole
        run, not of what is left of it. eval_batch_size: samples in a validation batch of a rank.
        eval_sequences: validate on that many first samples of all ranks together; None takes all.
        """
        super().__init__()
        self.config = config
        self.micro_batch_size = micro_batch_size
        self.accumulate = accumulate
        self.num_steps = num_steps
        self.eval_batch_size = eval_batch_size
        self.eval_sequences = eval_sequences
        self.start_step = 0
        self.skipped_samples: Sequence[tuple[int, int]] = ()
        self._planned: tuple[int, SampleOrder | MixtureOrder] | None = None

    @cached_property
    def indexes(self) -> dict[str, ShardIndex]:
        """The index of each source, checked as configured. Raises DataError."""
        return load_indexes(self.config)

    @cached_property
    def summary(self) -> IndexSummary:
        """The summary of all that is read. Raises DataError."""
        return self.config.summary_of({name: i.summary for name, i in self.indexes.items()})

    @cached_property
    def train_data(self) -> TokenDataset | MixtureDataset:
        """The samples of the ``train`` split."""
        return open_split(self.config, self.indexes, "train")

    @cached_property
    def valid_data(self) -> TokenDataset | MixtureDataset:
        """The samples of the ``valid`` split."""
        return open_split(self.config, self.indexes, "valid")

    @property
    def fingerprint(self) -> str:
        """Identity of the stream: equal only if every position means the same tokens."""
        seed, shuffle = self.config.seed, self.config.shuffle
        stream = [self.summary.fingerprint, self.train_data.seq_len, seed, shuffle]
        order = self.order
        return digest(stream if isinstance(order, SampleOrder) else [*stream, order.identity])

    @property
    def order(self) -> SampleOrder | MixtureOrder:
        """The order of the training samples, planned once for a number of samples of the run."""
        run_samples = self.num_steps * self.plan().samples_per_step
        if self._planned is None or self._planned[0] != run_samples:
            order = order_of(self.config, self.train_data, run_samples)
            self._planned = (run_samples, order)
        return self._planned[1]

    def plan(self) -> BatchPlan:
        """How a step's samples are assigned, as seen from this rank."""
        world_size, rank = self._world()
        return BatchPlan(self.micro_batch_size, self.accumulate, self.num_steps, world_size, rank)

    def sample_numbers(self, step: int) -> list[int]:
        """The numbers of all ranks' samples in an optimizer step, in the order of the stream.

        step: counted from 0.
        """
        return [number for _, number in self.stream_of(step)]

    def stream_of(self, step: int) -> list[tuple[int, int]]:
        """The same with the position in the stream before each."""
        positions = self._positions(step)
        numbers = self.order.lookup(positions)
        return list(zip(positions.tolist(), numbers.tolist(), strict=True))

    def _positions(self, step: int) -> NDArray[np.int64]:
        samples = self.plan().samples_per_step
        consumed = np.arange(step * samples, (step + 1) * samples, dtype=np.int64)
        return stream_positions(consumed, self.skipped_samples)

    def padding_share(self, step: int) -> float | None:
        """Return the share of a step's places that train nothing; None: the data have no padding.

        step: counted from 0.
        """
        if not self.train_data.has_padding:
            return None
        places = self.plan().samples_per_step * self.train_data.seq_len
        return 1 - self._num_targets(step) / places

    def _num_targets(self, step: int) -> int:
        """How many tokens all ranks predict in a step: a function of the stream's positions."""
        return self.train_data.num_targets(self.order.lookup(self._positions(step)))

    def _weight_of(self, plan: BatchPlan) -> Callable[[int, Batch], float] | None:
        """What computes a batch's weight by its number; None: all have equally many targets."""
        if not self.train_data.has_padding:
            return None
        start = self.start_step
        # Once a step.
        num_targets = lru_cache(maxsize=2)(self._num_targets)
        num_batches = plan.accumulate * plan.world_size

        def weight(number: int, batch: Batch) -> float:
            in_step = num_targets(start + number // plan.accumulate)
            return batch.num_targets * num_batches / max(1, in_step)

        return weight

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of ``micro_batch_size`` from ``start_step`` on; its length is the whole run's.

        Raises DataError where the shards are missing or damaged.
        """
        plan = self.plan()
        loader = self._loader(
            self.train_data,
            RankBatchSampler(self.order, plan, self.start_step, self.skipped_samples),
        )
        batch_bytes = plan.micro_batch_size * (self.train_data.seq_len + 1) * _TOKEN_BYTES
        most = max(1, _AHEAD_BYTES // batch_bytes)
        ready = max(loader.num_ahead, _STEPS_AHEAD * plan.accumulate)
        loader.num_ahead = min(ready + MOST_THREADS, most)
        loader.filler = self._filler(plan)
        loader.weight_of = self._weight_of(plan)
        samples = plan.samples_per_step
        loader.consumed = (self.start_step * samples, samples / plan.accumulate)
        return loader

    def _filler(self, plan: BatchPlan) -> ShardFiller | None:
        """What fetches whole shards for this node; None where nothing is behind a URL."""
        sources = sources_of(self.train_data)
        if not any(isinstance(source, RemoteTokenDataset) for _, source in sources):
            return None
        num_nodes = 1 if self.trainer is None else self.trainer.num_nodes
        order, skipped = self.order, self.skipped_samples

        def lookup(first: int, count: int) -> NDArray[np.int64]:
            consumed = np.arange(first, first + count, dtype=np.int64)
            return order.lookup(stream_positions(consumed, skipped))

        num_samples = plan.num_steps * plan.samples_per_step
        steps_ahead = _STEPS_AHEAD + -(-MOST_THREADS // plan.accumulate)
        ahead = 2 * steps_ahead * plan.samples_per_step
        upcoming = Upcoming(num_samples, lookup, max(1, num_nodes), ahead)
        return open_filler(sources, self.indexes.values(), upcoming)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The batches of `valid_parts`, one source after another.

        The ranks have equally many batches, but not always samples: weigh by the batch's size.
        """
        samplers = list(self._valid_samplers().values())
        batches = samplers[0] if len(samplers) == 1 else ChainedBatchSampler(samplers)
        return self._loader(self.valid_data, batches)

    def valid_parts(self) -> dict[str, ValidPart]:
        """The held-out batches of each source by name; of one directory its name is empty.

        The sources of a mixture share the ``eval_sequences`` evenly; one with fewer has all of its
        own. The batches can be read once.

        Raises DataError where the shards are missing or damaged, or there is no sample.
        """
        return {
            name: ValidPart(self._valid_batches(sampler), not sampler.is_repeat)
            for name, sampler in self._valid_samplers().items()
        }

    def _valid_batches(self, sampler: EvalBatchSampler) -> Iterator[Batch]:
        """Yield batches from a loader whose workers end with it: one source has some at a time."""
        yield from self._loader(self.valid_data, sampler)

    def _valid_samplers(self) -> dict[str, EvalBatchSampler]:
        """The samples of each source that this rank validates on; they may repeat a rank's."""
        data, most = self.valid_data, self.eval_sequences
        if isinstance(data, TokenDataset):
            available = {"": (0, len(data))}
        else:
            counts = map(len, data.sources)
            places = zip(data.first_numbers, counts, strict=False)
            available = dict(zip(data.names, places, strict=True))
            most = None if most is None else max(1, most // len(available))
        return {
            name: EvalBatchSampler(
                min(most or count, count), self.eval_batch_size, *self._world(), first=first
            )
            for name, (first, count) in available.items()
        }

    def check_shared_memory(self, num_processes: int) -> None:
        """Check that batches that workers have read ahead fit in this node's shared memory.

        num_processes: of training on this node.

        Raises:
            DataError: they do not.
        """
        config, batches = self.config, self.micro_batch_size + self.eval_batch_size
        if config.num_workers == 0 or not SHARED_MEMORY.is_dir():
            return
        # Inputs and targets share their memory, without padding; documents may be numbered.
        copies = 4 if self.train_data.has_padding else 2
        batch_bytes = copies * batches * (self.train_data.seq_len + 1) * _TOKEN_BYTES
        ahead = config.num_workers * config.prefetch_factor * num_processes
        needed, free = ahead * batch_bytes + SPARE_BYTES, shutil.disk_usage(SHARED_MEMORY).free
        if free < needed:
            raise DataError(
                f"{SHARED_MEMORY} has {free:,} bytes free, and {config.num_workers} workers of each"
                f" of {num_processes} processes may need {needed:,}. {SHARED_MEMORY_REMEDY}"
            )

    def _world(self) -> tuple[int, int]:
        """(World size, rank) of the ranks that read different data."""
        if self.trainer is None:
            return 1, 0
        # Ranks of one tensor-parallel group read the same data; the strategy knows them apart.
        shares = self.trainer.distributed_sampler_kwargs
        if shares:
            return int(shares["num_replicas"]), int(shares["rank"])
        return self.trainer.world_size, self.trainer.global_rank

    def _worker_timeout(self) -> float:
        """Seconds for a batch: a server may be asked several times for its bytes."""
        is_remote = any(map(is_url, self.config.paths.values()))
        return _WORKER_TIMEOUT + (_REQUESTS * self.config.fetch_timeout if is_remote else 0)

    def _loader(
        self, data: TokenDataset | MixtureDataset, batches: Sampler[list[int]]
    ) -> TokenLoader:
        workers = self.config.num_workers
        loader = TokenLoader(
            data,  # type: ignore[arg-type]  # of tensors, which collate_fn makes batches of
            batch_sampler=batches,
            num_workers=workers,
            # The data set returns whole batches already.
            collate_fn=partial(
                collate_tokens, eos_id=self.config.eos_id, has_padding=data.has_padding
            ),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            timeout=self._worker_timeout() if workers else 0,
            prefetch_factor=self.config.prefetch_factor if workers else None,
            # A loader without a generator draws from the global one, and a resumed run, which
            # makes its loaders at another point, would continue with other random numbers.
            generator=torch.Generator().manual_seed(self.config.seed),
        )
        loader.num_ahead = self.config.prefetch_factor
        return loader
