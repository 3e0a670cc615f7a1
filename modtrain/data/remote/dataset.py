"""Sample number → tokens, of shards behind a URL."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Container
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modtrain.data.remote.shards import RemoteShards, evict_others
from modtrain.data.stream.dataset import TokenDataset
from modtrain.data.stream.index import ShardIndex


class RemoteTokenDataset(TokenDataset):
    """The samples of one split behind a URL; the same numbers as those of a copy on disk.

    It takes little memory a shard, and may be read by several threads.
    """

    def __init__(
        self,
        index: ShardIndex,
        shards: RemoteShards,
        seq_len: int | None,
        own: Container[str] | None = None,
    ) -> None:
        """shards: of one split of ``index``.

        own: checksums of all shards of the run: each shard that is read comes whole into the
        cache, in the place of shards of no use to the run. None: what the cache lacks is read by
        ranges.
        """
        self.shards = shards
        self._own = own
        super().__init__(index, shards.split, seq_len)

    def _side_file(self) -> Callable[[ShardIndex, str], Path]:
        return self.shards.side_file

    def _open(self, index: ShardIndex, split: str) -> None:
        shards = index.shards[split]
        first = shards[0].members[0][1] if shards else 1
        # The index guarantees that all members but the split's last are of the first one's size.
        self._samples_per_member = first * self._parts
        counts = [shard.num_sequences * self._parts for shard in shards]
        self.first_numbers = array("q", accumulate(counts, initial=0))
        self._num_samples = self.first_numbers[-1]
        self._sample_bytes = (self.seq_len + 1) * self._item_size

    def _forget(self) -> None:
        """Nothing is mapped."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def _rows(self, numbers: list[int]) -> list[NDArray[Any]]:
        wanted = []
        for number in numbers:
            shard, byte = self._place(number)
            wanted.append((shard, byte, byte + self._sample_bytes))
        if self._own is not None:
            make_room = partial(evict_others, self.shards.cache, self._own)
            for shard in sorted({shard for shard, *_ in wanted}):
                self.shards.fetch(shard, make_room=make_room)
        return [np.frombuffer(row, self._dtype) for row in self.shards.read(wanted)]

    def locate(self, number: int) -> tuple[Path | str, int]:
        """Return the URL of a sample's shard, and the byte of it at which its tokens begin."""
        shard, byte = self._place(number)
        return self.shards.location(shard), byte

    def _place(self, number: int) -> tuple[int, int]:
        """Return the shard of a sample, and the byte at which its tokens begin."""
        shard = bisect_right(self.first_numbers, number) - 1
        member, inside = divmod(number - self.first_numbers[shard], self._samples_per_member)
        # A sample starts every S tokens; each stored sequence ends with a token of the next.
        item = inside * self.seq_len + inside // self._parts
        return shard, self.shards.first_byte(shard, member) + item * self._item_size
