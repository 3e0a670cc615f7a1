"""The door: what a run reads, from one prepared directory or from a mixture of several.

A mixture's samples are numbered source after source, by the sources' sorted names. So a sampler and
a data set of a mixture are used as those of one directory are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from modtrain.common.errors import raise_if_any
from modtrain.data.config import DataConfig, seq_len_problems
from modtrain.data.mixture.order import MixtureOrder
from modtrain.data.remote.cache import ShardCache
from modtrain.data.remote.dataset import RemoteTokenDataset
from modtrain.data.remote.shards import RemoteShards, fetch_all, kept_checksums
from modtrain.data.stream.dataset import TokenDataset
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.order import SampleOrder


class MixtureDataset(Dataset[Tensor]):
    """The samples of one split of all sources: number n → int64 tensor (S + 1,)."""

    def __init__(self, sources: Mapping[str, TokenDataset]) -> None:
        """sources: data sets with samples of one length, by name."""
        self.names = tuple(sorted(sources))
        self.sources = [sources[name] for name in self.names]
        self.seq_len = self.sources[0].seq_len
        # Number of each source's first sample, and the number of all samples.
        self.first_numbers = list(accumulate(map(len, self.sources), initial=0))

    def __len__(self) -> int:
        return self.first_numbers[-1]

    def __getitem__(self, number: int) -> Tensor:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> Tensor:
        """Samples ``numbers`` as one int64 tensor (B, S + 1); what a DataLoader calls.

        Raises IndexError outside the split, and DataError as `TokenDataset` does.
        """
        tokens_BT = torch.empty((len(numbers), self.seq_len + 1), dtype=torch.int64)
        rows_by_source: dict[int, list[int]] = {}
        places = [self._place(number) for number in numbers]
        for row, (source, _) in enumerate(places):
            rows_by_source.setdefault(source, []).append(row)
        for source, rows in rows_by_source.items():
            own = [places[row][1] for row in rows]
            tokens_BT[rows] = self.sources[source].__getitems__(own)
        return tokens_BT

    @property
    def has_padding(self) -> bool:
        """Whether samples of any source may end with padding."""
        return any(source.has_padding for source in self.sources)

    def num_targets(self, numbers: NDArray[np.int64]) -> int:
        """Return how many tokens of the samples ``numbers`` are predicted; no shard is read."""
        source_B = np.searchsorted(self.first_numbers, numbers, side="right") - 1
        return sum(
            source.num_targets(numbers[source_B == place] - self.first_numbers[place])
            for place, source in enumerate(self.sources)
        )

    def document_pieces(self, number: int) -> list[tuple[int, int]]:
        """Return the stretches of its source's tokens that a sample is, as `TokenDataset` does."""
        source, own = self._place(number)
        return self.sources[source].document_pieces(own)

    def locate(self, number: int) -> tuple[Path | str, int]:
        """Return the path or the URL of a sample's shard, and the byte of its first token there."""
        source, own = self._place(number)
        return self.sources[source].locate(own)

    def source_of(self, number: int) -> tuple[str, int]:
        """Return the name of a sample's source, and the sample's number in it."""
        source, own = self._place(number)
        return self.names[source], own

    def _place(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        source = bisect_right(self.first_numbers, number) - 1
        return source, number - self.first_numbers[source]


def load_indexes(config: DataConfig) -> dict[str, ShardIndex]:
    """Read and check the index of each source by name; of one directory its name is empty.

    Raises DataError that names the file and the remedy.
    """
    indexes = {name: ShardIndex.load(path, config.verify) for name, path in config.paths.items()}
    if config.verify == "sha256":
        remote = [index for index in indexes.values() if index.is_remote]
        fetch_all(remote, ShardCache(config.cache_dir, config.cache_bytes), config.fetch_timeout)
    return indexes


def open_split(
    config: DataConfig, indexes: Mapping[str, ShardIndex], split: str
) -> TokenDataset | MixtureDataset:
    """Return the samples of one split of everything that ``config`` reads."""
    if not config.sources:
        return _open_sources(config, indexes, split, config.seq_len)[""]
    stored = config.summary_of({name: index.summary for name, index in indexes.items()}).seq_len
    seq_len = config.seq_len or stored
    raise_if_any(seq_len_problems("data.seq_len", seq_len, stored))
    return MixtureDataset(_open_sources(config, indexes, split, seq_len))


def _open_sources(
    config: DataConfig, indexes: Mapping[str, ShardIndex], split: str, seq_len: int | None
) -> dict[str, TokenDataset]:
    # What is held out is read at each evaluation, so that it comes whole and stays.
    remote = [index for index in indexes.values() if index.is_remote]
    own = kept_checksums(remote) if split == "valid" else None
    cache = ShardCache(config.cache_dir, config.cache_bytes)
    sources: dict[str, TokenDataset] = {}
    for name, index in indexes.items():
        if index.is_remote:
            shards = RemoteShards(index, split, cache, config.fetch_timeout)
            sources[name] = RemoteTokenDataset(index, shards, seq_len, own)
        else:
            sources[name] = TokenDataset(index, split, seq_len)
    return sources


def sources_of(data: Dataset[Any]) -> list[tuple[int, TokenDataset]]:
    """Return the data sets of the sources of ``data``, each with the number of its first sample."""
    if isinstance(data, MixtureDataset):
        return list(zip(data.first_numbers, data.sources, strict=False))
    return [(0, data)] if isinstance(data, TokenDataset) else []


def order_of(
    config: DataConfig, data: TokenDataset | MixtureDataset, run_samples: int
) -> SampleOrder | MixtureOrder:
    """Return the order of the training samples ``data``.

    run_samples: that the run reads in all.
    Raises ConfigError for stages that such a run cannot have.
    """
    if isinstance(data, TokenDataset):
        return SampleOrder(len(data), config.seed, config.shuffle)
    counts = {name: len(source) for name, source in zip(data.names, data.sources, strict=True)}
    schedule = config.schedule(counts, run_samples, data.seq_len)
    return MixtureOrder(schedule, list(counts.values()), config.seed, config.shuffle)
