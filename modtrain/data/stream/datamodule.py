"""The prepared data for Lightning: a stream that restarts at any step, and a fixed validation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from modtrain.common.atomic_io import digest
from modtrain.data.config import DataConfig
from modtrain.data.stream.batch import Batch
from modtrain.data.stream.dataset import TokenDataset
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.order import SampleOrder
from modtrain.data.stream.samplers import (
    BatchPlan,
    EvalBatchSampler,
    RankBatchSampler,
    stream_positions,
)


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

    @cached_property
    def index(self) -> ShardIndex:
        """The index of the shards, checked as configured. Raises DataError."""
        return ShardIndex.load(self.config.path, self.config.verify)

    @cached_property
    def train_data(self) -> TokenDataset:
        """The samples of the ``train`` split."""
        return TokenDataset(self.index, "train", self.config.seq_len)

    @cached_property
    def valid_data(self) -> TokenDataset:
        """The samples of the ``valid`` split."""
        return TokenDataset(self.index, "valid", self.config.seq_len)

    @property
    def fingerprint(self) -> str:
        """Identity of the stream: equal only if every position means the same tokens."""
        shards, seed, shuffle = self.index.summary, self.config.seed, self.config.shuffle
        return digest([shards.fingerprint, self.train_data.seq_len, seed, shuffle])

    @property
    def order(self) -> SampleOrder:
        """The order of the training samples."""
        return SampleOrder(len(self.train_data), self.config.seed, self.config.shuffle)

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
        samples = self.plan().samples_per_step
        consumed = np.arange(step * samples, (step + 1) * samples, dtype=np.int64)
        positions = stream_positions(consumed, self.skipped_samples)
        numbers = self.order.lookup(positions)
        return list(zip(positions.tolist(), numbers.tolist(), strict=True))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of ``micro_batch_size`` from ``start_step`` on; its length is the whole run's.

        Raises DataError where the shards are missing or damaged.
        """
        return self._loader(
            self.train_data,
            RankBatchSampler(self.order, self.plan(), self.start_step, self.skipped_samples),
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches of the first ``eval_sequences`` samples, those of `valid_batches`.

        The ranks have equally many batches, but not always samples: weigh by the batch's size.
        """
        return self._loader(self.valid_data, self.valid_batches())

    def valid_batches(self) -> EvalBatchSampler:
        """The samples that this rank validates on; they may repeat another rank's.

        Raises DataError where the shards are missing or damaged, or there is no sample.
        """
        available = len(self.valid_data)
        num_samples = min(self.eval_sequences or available, available)
        return EvalBatchSampler(num_samples, self.eval_batch_size, *self._world())

    def _world(self) -> tuple[int, int]:
        """(World size, rank) of the ranks that read different data."""
        if self.trainer is None:
            return 1, 0
        # Ranks of one tensor-parallel group read the same data; the strategy knows them apart.
        shares = self.trainer.distributed_sampler_kwargs
        if shares:
            return int(shares["num_replicas"]), int(shares["rank"])
        return self.trainer.world_size, self.trainer.global_rank

    def _loader(self, data: TokenDataset, batches: Sampler[list[int]]) -> DataLoader[Batch]:
        workers = self.config.num_workers
        return DataLoader(
            data,  # type: ignore[arg-type]  # of tensors, which collate_fn makes batches of
            batch_sampler=batches,
            num_workers=workers,
            # The data set returns whole batches already.
            collate_fn=partial(Batch.from_tokens, eos_id=self.config.eos_id),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            prefetch_factor=self.config.prefetch_factor if workers else None,
            # A loader without a generator draws from the global one, and a resumed run, which
            # makes its loaders at another point, would continue with other random numbers.
            generator=torch.Generator().manual_seed(self.config.seed),
        )
