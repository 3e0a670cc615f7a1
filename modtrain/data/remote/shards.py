"""The shards of an index behind a URL: from the cache where they are whole there, else by ranges.

A shard that comes whole is compared with its SHA-256. Of one that is read by ranges, size, header
and version are looked at once, and each range is refused where the server tells that the file is
another one by then.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from modtrain.common.errors import DataError
from modtrain.data.remote.cache import ShardCache
from modtrain.data.remote.files import ChangedError, Range, RemoteFiles
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.prepared import PACKING_FILES, SPLITS

log = logging.getLogger(__name__)


class RemoteShards:
    """The shards of one split, by their number in it."""

    def __init__(self, index: ShardIndex, split: str, cache: ShardCache, timeout: float) -> None:
        """cache: for whole shards. timeout: seconds for a request."""
        self.split = split
        self.shards = index.shards[split]
        self.cache = cache
        self.files = RemoteFiles(index.location, timeout)
        self._dtype = np.dtype(index.summary.dtype).newbyteorder("<")
        self._stored_len = index.summary.seq_len
        # By shard. One that was looked at stays: a hundred bytes each.
        self._versions: dict[int, str | None] = {}
        self._headers: dict[int, bytes] = {}

    def location(self, number: int) -> str:
        """The URL of a shard."""
        return self.files.location(self._name(number))

    def first_byte(self, number: int, member: int) -> int:
        """The byte of a shard at which a member's tokens begin."""
        offset, count = self.shards[number].members[member]
        return offset + len(self._header(count))

    def read(self, wanted: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """Return the bytes (shard, start, stop) of the split; all that the cache lacks at once.

        Raises DataError where a shard is not what its index says, or does not come.
        """
        cached: list[bytes | None] = []
        for number, start, stop in wanted:
            part = self.cache.read(self.shards[number], [(start, stop)])
            cached.append(part[0] if part else None)
        missing = [wanted[place] for place, part in enumerate(cached) if part is None]
        if missing:
            self._look_at({number for number, _, _ in missing})
            ranges = [
                Range(self._name(number), start, stop, self._versions[number])
                for number, start, stop in missing
            ]
            came = iter(self.files.read_ranges(ranges))
            return [next(came) if part is None else part for part in cached]
        return [part for part in cached if part is not None]

    def fetch(
        self,
        number: int,
        *,
        make_room: Callable[[int], bool] | None = None,
        between: Callable[[], None] | None = None,
        num_at_once: Callable[[], int] | None = None,
    ) -> bool:
        """Fetch a shard whole into the cache; return whether it is there then.

        make_room: as of `ShardCache.fetch`. between: called after each chunk. num_at_once: as of
        `RemoteFiles.chunks`.
        """
        more = {} if num_at_once is None else {"num_at_once": num_at_once}
        shard, name = self.shards[number], self._name(number)

        def chunks() -> Iterator[bytes]:
            for chunk in self.files.chunks(name, shard.num_bytes, **more):
                yield chunk
                if between is not None:
                    between()

        where = self.location(number)
        return self.cache.fetch(shard, chunks, location=where, make_room=make_room)

    def side_file(self, index: ShardIndex, name: str) -> Path:
        """Return where a side file of ``index`` lies: in the cache, so that a node fetches it once.

        What the cache cannot take lies in a directory of this process. Raises DataError.
        """
        file = index.side_files[name]
        there = self.cache.path(file)
        if there is None:
            self.cache.fetch(
                file,
                lambda: self.files.chunks(name, file.num_bytes),
                location=self.files.location(name),
                make_room=partial(evict_others, self.cache, kept_checksums([index])),
            )
            there = self.cache.path(file)
        return there or index.side_file(name)

    def _look_at(self, numbers: set[int]) -> None:
        """Compare size and header of shards that were not looked at yet; keep their versions."""
        new = sorted(numbers - self._versions.keys())
        if not new:
            return
        versions = self.files.versions([self._name(number) for number in new])
        for number, (size, _) in zip(new, versions, strict=True):
            if size != self.shards[number].num_bytes:
                raise ChangedError(
                    f"{self.location(number)}: has {size:,} bytes on the server, not"
                    f" {self.shards[number].num_bytes:,}. Copy the prepared directory there again."
                )
        ranges, expected = [], []
        for number, (_, version) in zip(new, versions, strict=True):
            offset, count = self.shards[number].members[0]
            header = self._header(count)
            ranges.append(Range(self._name(number), offset, offset + len(header), version))
            expected.append(header)
        headers = self.files.read_ranges(ranges)
        for number, header, right in zip(new, headers, expected, strict=True):
            if header != right:
                raise DataError(
                    f"{self.location(number)}: no tokens where the index has them; the shard is"
                    " damaged. Copy it there again."
                )
        self._versions.update(
            (number, version) for number, (_, version) in zip(new, versions, strict=True)
        )

    def _header(self, count: int) -> bytes:
        """The .npy header of a member of ``count`` sequences, as numpy writes it."""
        if count not in self._headers:
            stream, shape = io.BytesIO(), (count, self._stored_len + 1)
            content = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, content)
            self._headers[count] = stream.getvalue()
        return self._headers[count]

    def _name(self, number: int) -> str:
        return f"{self.split}/{self.shards[number].name}"


def fetch_all(indexes: Sequence[ShardIndex], cache: ShardCache, timeout: float) -> None:
    """Fetch every shard of all indexes, with its checksum, before anything is read of them.

    Raises:
        DataError: one is damaged or does not come, or the cache has no room for all.
    """
    own = {
        s.sha256: s.num_bytes for index in indexes for split in SPLITS for s in index.shards[split]
    }
    remedy = "raise data.cache_bytes, or set data.verify=size, which checks what comes whole"
    if sum(own.values()) > cache.max_bytes:
        raise DataError(
            f"data.verify=sha256 needs all {sum(own.values()):,} bytes in the cache before"
            " training,"
            f" and data.cache_bytes allows {cache.max_bytes:,.0f}: {remedy}"
        )
    make_room = partial(evict_others, cache, own)
    for index in indexes:
        log.info("%s: fetching all shards into %s", index.location, cache.directory)
        for split in SPLITS:
            shards = RemoteShards(index, split, cache, timeout)
            for number in range(len(shards.shards)):
                if not shards.fetch(number, make_room=make_room):
                    where = f"there is no room for it in {cache.directory}"
                    raise DataError(f"{shards.location(number)}: {where}: {remedy}")


def kept_checksums(indexes: Iterable[ShardIndex]) -> frozenset[str]:
    """Return the checksums of what a run keeps in the cache of several indexes."""
    checksums: set[str] = set()
    for index in indexes:
        checksums.update(s.sha256 for split in SPLITS for s in index.shards[split])
        checksums.update(f.sha256 for n, f in index.side_files.items() if n in PACKING_FILES)
    return frozenset(checksums)


def evict_others(cache: ShardCache, own: Container[str], num_bytes: int) -> bool:
    """Evict shards of no use to this run until ``num_bytes`` are free; whether they are then."""
    others = {sha256: size for sha256, size in cache.sizes().items() if sha256 not in own}
    if sum(others.values()) < num_bytes:
        return False
    for sha256, size in others.items():
        if num_bytes <= 0:
            break
        cache.evict(sha256)
        num_bytes -= size
    return True
