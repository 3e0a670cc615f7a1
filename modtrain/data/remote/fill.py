"""Which shards a node fetches whole, ahead of the steps that read them.

The order of the samples is known, so nothing is guessed. A shard comes whole where that pays:

- the rest of the run reads as much on this node as all shards have: each that fits is kept;
- the samples to come take half of the shard or more, as without shuffling: it comes before them, in
  the place of the one that is needed last.

Else, as in the one epoch of a shuffled run over many nodes, ranges are fewer bytes. The step goes
first: while it waits for samples, or few of those to come are there, whole shards wait.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import TypeVar

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from modtrain.common.atomic_io import digest
from modtrain.common.errors import DataError
from modtrain.data.remote.dataset import RemoteTokenDataset
from modtrain.data.remote.files import CHUNKS_AT_ONCE, ChangedError
from modtrain.data.remote.shards import kept_checksums
from modtrain.data.stream.dataset import TokenDataset
from modtrain.data.stream.index import ShardIndex

log = logging.getLogger(__name__)
B = TypeVar("B")
# Positions looked up at once; a new plan is made after an eighth of them.
_WINDOW = 1 << 19
# The share of a shard that the window must read for it to be fetched and others to go.
_DENSE = 0.5
_NEVER = np.iinfo(np.int64).max
# Seconds: until the next look where there is nothing to do, or another process fetches.
_IDLE = 2.0
# A step has waited lately, and the longest that a chunk is put off for it.
_LATELY, _LONGEST_DELAY = 1.0, 5.0
_LEAST_WAIT = 0.002
# While the samples' requests are behind, whole shards take one part in so many of the time.
_PARTS = 10
# Looking for what to fetch takes the processor that steps need: at most one part in so many.
_LOOKS = 50


class _StoppedError(Exception):
    """The run ends while a shard comes."""


@dataclass(frozen=True)
class Upcoming:
    """The samples that all ranks of a run are to read.

    num_samples: that the whole run consumes. lookup: (first consumed, number) → sample numbers.
    num_nodes: that share them. read_ahead: samples of a step and those read ahead of it.
    """

    num_samples: int
    lookup: Callable[[int, int], NDArray[np.int64]]
    num_nodes: int
    read_ahead: int


class ShardTable:
    """The shards of several data sets behind URLs, as one list."""

    def __init__(self, sources: list[tuple[int, RemoteTokenDataset]]) -> None:
        """sources: (number of its first sample in the run's numbering, data set), in order."""
        self.sources = [data for _, data in sources]
        starts = [np.asarray(data.first_numbers) + first for first, data in sources]
        counts = [len(data.shards.shards) for data in self.sources]
        self.starts_N = np.concatenate([part[:-1] for part in starts])
        self.stops_N = np.concatenate([part[1:] for part in starts])
        self.source_N = np.repeat(np.arange(len(counts)), counts)
        self._own_N = np.concatenate([np.arange(count) for count in counts])
        shards = [shard for data in self.sources for shard in data.shards.shards]
        self.bytes_N = np.array([shard.num_bytes for shard in shards], dtype=np.int64)
        self.checksums = [shard.sha256 for shard in shards]
        self.cache = self.sources[0].shards.cache

    def place(self, number: int) -> tuple[RemoteTokenDataset, int]:
        """The data set of a shard, and the shard's number there."""
        return self.sources[int(self.source_N[number])], int(self._own_N[number])

    def uses(self, samples_P: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return by shard its first place in ``samples_P``, `_NEVER` without one; and how many."""
        shards_P = np.searchsorted(self.starts_N, samples_P, side="right") - 1
        is_remote_P = (shards_P >= 0) & (samples_P < self.stops_N[shards_P])
        used_shards, first, counts = np.unique(
            shards_P[is_remote_P], return_index=True, return_counts=True
        )
        next_N = np.full(len(self.starts_N), _NEVER, dtype=np.int64)
        count_N = np.zeros(len(self.starts_N), dtype=np.int64)
        next_N[used_shards] = np.flatnonzero(is_remote_P)[first]
        count_N[used_shards] = counts
        return next_N, count_N


class ShardFiller:
    """A thread that fetches whole shards for its node; of a node's processes one does at a time.

    position: samples consumed by all ranks; set while the run goes on.
    """

    def __init__(
        self, table: ShardTable, upcoming: Upcoming, *, own: Container[str], reserved_bytes: int
    ) -> None:
        """own: checksums of all shards of the run. reserved_bytes: of the cache, for others."""
        self.table = table
        self.upcoming = upcoming
        self.position = 0
        self._cache = table.cache
        self._reserved = min(reserved_bytes, self._cache.max_bytes / 2)
        self._own = own
        self._key = digest(sorted(table.checksums))[:16]
        self._error: ChangedError | None = None
        self._last_wait = -_LATELY
        self._chunk_began = 0.0
        self._is_behind: Callable[[], bool] = lambda: False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ShardFiller:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            # A request to a server that does not answer goes on by itself.
            self._thread.join(_LONGEST_DELAY)

    def watched(
        self,
        batches: Iterator[B],
        first: int,
        samples_per_batch: float,
        is_behind: Callable[[], bool] = lambda: False,
    ) -> Iterator[B]:
        """Yield ``batches``, and keep record of where they are and how long they take.

        first: samples consumed before them. samples_per_batch: of all ranks, on average.
        is_behind: whether the batches that are read ahead need the server by themselves.
        Raises ChangedError where a shard came damaged.
        """
        self._is_behind = is_behind
        for number in count():
            self.position = first + int(number * samples_per_batch)
            began = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            ended = time.monotonic()
            if ended - began > _LEAST_WAIT:
                self._last_wait = ended
            if self._error is not None:
                raise self._error
            if self._thread is None:
                # Not before: until then workers are forked.
                self._start()
            yield batch

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="shard-filler", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._cache.make_directory()
                with FileLock(self._cache.directory / f"fill-{self._key}.lock", blocking=False):
                    while not self._stop.is_set():
                        self._stop.wait(max(_IDLE, _LOOKS * self.fill()))
            except Timeout:
                pass
            except _StoppedError:
                return
            except ChangedError as error:
                self._error = error
                return
            except (DataError, OSError) as error:
                # The samples come by ranges meanwhile, or fail by themselves.
                log.warning("no shard is fetched ahead for now: %s", error)
            self._stop.wait(_IDLE)

    def fill(self) -> float:
        """Fetch what pays of the samples that come next, once; return the seconds to find it."""
        began, position = time.monotonic(), self.position
        samples_P = self._window(position)
        next_N, count_N = self.table.uses(samples_P)
        left = self.upcoming.num_samples - position
        keeps = self._kept_sources(count_N, left / max(1, len(samples_P)))
        by_use = np.argsort(next_N, kind="stable")
        seconds = time.monotonic() - began
        for number in by_use[: np.count_nonzero(next_N != _NEVER)].tolist():
            if self.position - position > len(samples_P) // 8 or self._cache.is_paused:
                return seconds
            data, own = self.table.place(number)
            shard_bytes = int(self.table.bytes_N[number])
            samples = int(self.table.stops_N[number] - self.table.starts_N[number])
            is_dense = int(count_N[number]) >= _DENSE * samples * self.upcoming.num_nodes
            # Its samples are on their way already.
            is_late = next_N[number] < self.position - position + self.upcoming.read_ahead
            is_kept = keeps[self.table.source_N[number]]
            if not (is_kept or (is_dense and not is_late)):
                continue
            if data.shards.cache.has(data.shards.shards[own]):
                continue
            limit = next_N[number] if is_dense else _NEVER
            if not self._make_room(shard_bytes, next_N, limit):
                return seconds
            self._chunk_began = time.monotonic()
            self._give_way()
            data.shards.fetch(own, between=self._give_way, num_at_once=self._num_at_once)
        return seconds

    def _num_at_once(self) -> int:
        return 1 if self._is_behind() else CHUNKS_AT_ONCE

    def _kept_sources(self, count_N: NDArray[np.int64], windows: float) -> list[bool]:
        """Of which sources the rest of the run reads as much on this node as there is.

        windows: how many windows like this one the rest of the run is.
        """
        table = self.table
        return [
            windows * int(count_N[table.source_N == number].sum())
            >= self.upcoming.num_nodes * len(data)
            for number, data in enumerate(table.sources)
        ]

    def _window(self, position: int) -> NDArray[np.int64]:
        num_samples = min(_WINDOW, self.upcoming.num_samples - position)
        return self.upcoming.lookup(position, max(0, num_samples))

    def _make_room(self, num_bytes: int, next_N: NDArray[np.int64], limit: int) -> bool:
        """Evict until ``num_bytes`` are free: what is not of the run, then what is needed last.

        limit: a shard that is needed before it stays.
        """
        there = self._cache.sizes()
        too_much = sum(there.values()) + num_bytes + self._reserved - self._cache.max_bytes
        if too_much <= 0:
            return True
        victims = [sha for sha in there if sha not in self._own]
        if limit != _NEVER:
            uses = dict(zip(self.table.checksums, next_N.tolist(), strict=True))
            later = [sha for sha in there if uses.get(sha, -1) > limit]
            # Of equal ones the name decides, so that nothing is left to chance.
            victims += sorted(later, key=lambda sha: (-uses[sha], sha))
        if too_much > sum(there[sha] for sha in victims):
            return False
        for sha in victims:
            if too_much <= 0:
                break
            self._cache.evict(sha)
            too_much -= there[sha]
        return True

    def _give_way(self) -> None:
        """Wait while steps wait or soon will, but not for ever: the shard may be what helps them.

        A chunk that took long makes the next one wait the longer: a server that has little to spare
        would else give it what the steps need.
        """
        began = time.monotonic()
        end = began + max(_LONGEST_DELAY, _PARTS * (began - self._chunk_began))
        while (now := time.monotonic()) < end:
            if now >= self._last_wait + _LATELY and not self._is_behind():
                break
            if self._stop.wait(0.05):
                break
        if self._stop.is_set():
            raise _StoppedError
        self._chunk_began = time.monotonic()


def open_filler(
    sources: Sequence[tuple[int, TokenDataset]],
    indexes: Iterable[ShardIndex],
    upcoming: Upcoming,
) -> ShardFiller | None:
    """Return what fetches whole shards of ``sources``; None where none is behind a URL, or kept.

    sources: the training samples, each with the number of its first one. indexes: of all of them.
    """
    remote = [
        (n, data) for n, data in sources if isinstance(data, RemoteTokenDataset) and len(data)
    ]
    if not remote or remote[0][1].shards.cache.max_bytes <= 0:
        return None
    there = [index for index in indexes if index.is_remote]
    reserved = sum(shard.num_bytes for index in there for shard in index.shards["valid"])
    own = kept_checksums(there)
    return ShardFiller(ShardTable(remote), upcoming, own=own, reserved_bytes=reserved)
