"""Documents packed by best fit: the rows of each split, planned by several workers, and the shards.

Documents are packed with those near them: a window of the split at a time, which bounds the memory.
Windows follow from the units alone, so the rows do not depend on workers or nodes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modtrain.common.atomic_io import atomic_writer, digest, write_json
from modtrain.common.reading import UnreadableError, read_json
from modtrain.data.documents.record import UNIT_RECORD, Records, write_records
from modtrain.data.packing.best_fit import Ints, num_cut_if_concatenated, pack_documents
from modtrain.data.packing.rows import PIECE, ROW
from modtrain.data.packing.summary import SplitPacking
from modtrain.data.prepare.documents import UnitDocuments
from modtrain.data.prepare.pack import PackLayout, ShardJob, TokenFile
from modtrain.data.prepare.worker_pool import run_unfinished
from modtrain.data.stream.prepared import ITEM_SIZES, PIECES_NAME, ROWS_NAME, SPLITS, SideFile

# Of a window at most, or of a single unit's share; some 100 bytes a document and a row.
_WINDOW_DOCUMENTS = 1 << 20
_WINDOW_TOKENS = 1 << 28


@dataclass(frozen=True)
class Stretch:
    """Some documents of a unit in one split: from the number ``first``, before ``stop``.

    records: path of the unit's records. offset: place of the unit's first token in the split.
    """

    tokens: TokenFile
    records: str
    first: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Window:
    """Documents that are packed together. work: the working directory, with ``packing/``."""

    stretches: tuple[Stretch, ...]
    seq_len: int
    work: str

    @property
    def key(self) -> str:
        """Differs wherever the rows might."""
        parts = [[s.tokens.key, s.first, s.stop, s.offset] for s in self.stretches]
        return digest([self.seq_len, parts])[:32]

    def file(self, suffix: str) -> Path:
        """One of the window's files: its ``rows``, its ``pieces``, or ``json``, its counts."""
        return Path(self.work) / "packing" / f"{self.key}.{suffix}"

    def records(self, suffix: str, dtype: np.dtype[Any]) -> Records:
        """Map the rows or the pieces."""
        return np.memmap(self.file(suffix), dtype, mode="r")


@dataclass(frozen=True)
class WindowCounts:
    """What came of a window; the rest as of `SplitPacking`."""

    num_rows: int
    num_pieces: int
    num_padding: int
    num_cut: int
    num_cut_if_concatenated: int

    @property
    def packing(self) -> SplitPacking:
        """What the index says of it."""
        return SplitPacking(self.num_padding, self.num_cut, self.num_cut_if_concatenated)


@dataclass(frozen=True)
class PackedSplit:
    """The windows of a split, in order, and what came of each."""

    windows: list[Window]
    counts: list[WindowCounts]

    @property
    def num_rows(self) -> int:
        """Of all windows."""
        return sum(count.num_rows for count in self.counts)

    @property
    def packing(self) -> SplitPacking:
        """Of all windows."""
        return sum((count.packing for count in self.counts), SplitPacking(0, 0, 0))


def pack_splits(
    tokens: Mapping[str, Sequence[TokenFile]],
    documents: Mapping[str, Sequence[UnitDocuments]],
    seq_len: int,
    work: Path,
    num_workers: int,
    *,
    progress: bool,
) -> dict[str, PackedSplit]:
    """Decide for every document of each split in which row it goes."""
    (work / "packing").mkdir(exist_ok=True)
    windows = {s: plan_windows(tokens[s], documents[s], seq_len, work) for s in SPLITS}
    jobs = [window for split in SPLITS for window in windows[split]]
    sizes = [sum(s.stop - s.first for s in job.stretches) * UNIT_RECORD.itemsize for job in jobs]
    counts = run_unfinished(
        "packing documents", pack_window, finished_window, jobs, sizes, num_workers, progress
    )
    num_train = len(windows["train"])
    by_split = {"train": counts[:num_train], "valid": counts[num_train:]}
    return {split: PackedSplit(windows[split], by_split[split]) for split in SPLITS}


def plan_windows(
    tokens: Sequence[TokenFile],
    documents: Sequence[UnitDocuments],
    seq_len: int,
    work: Path,
    max_documents: int = _WINDOW_DOCUMENTS,
    max_tokens: int = _WINDOW_TOKENS,
) -> list[Window]:
    """Return the windows of a split: several units together, or parts of a large one."""
    windows: list[Window] = []
    open_stretches: list[Stretch] = []
    num_documents = num_tokens = offset = 0

    def close() -> None:
        nonlocal num_documents, num_tokens
        if open_stretches:
            windows.append(Window(tuple(open_stretches), seq_len, str(work)))
        open_stretches.clear()
        num_documents = num_tokens = 0

    for file, unit in zip(tokens, documents, strict=True):
        count = unit.num_documents
        parts = max(1, -(-count // max_documents), -(-file.num_tokens // max_tokens))
        parts = min(parts, max(1, count))
        is_too_much = (
            num_documents + count > max_documents or num_tokens + file.num_tokens > max_tokens
        )
        if parts > 1 or is_too_much:
            close()
        for part in range(parts if count else 0):
            first, stop = part * count // parts, (part + 1) * count // parts
            open_stretches.append(Stretch(file, unit.path, first, stop, offset))
            if parts > 1:
                close()
        if parts == 1:
            num_documents, num_tokens = num_documents + count, num_tokens + file.num_tokens
        offset += file.num_tokens
    close()
    return windows


def finished_window(job: Window) -> WindowCounts | None:
    """What an earlier run made of the window, None if it has to be done."""
    if not all(job.file(suffix).exists() for suffix in ("json", "rows", "pieces")):
        return None
    try:
        return WindowCounts(**read_json(job.file("json")))
    except (UnreadableError, TypeError):
        # Damaged: it is done again.
        return None


def pack_window(job: Window) -> WindowCounts:
    """Write the rows of a window, their pieces, and then the counts."""
    start_N, length_N = (np.concatenate(parts) for parts in zip(*_documents(job), strict=True))
    capacity = job.seq_len + 1
    packed = pack_documents(start_N, length_N, capacity)
    rows = np.empty(len(packed.first_R), ROW)
    rows["first_piece"], rows["length"] = packed.first_R, packed.length_R
    pieces = np.empty(len(packed.start_P), PIECE)
    pieces["start"], pieces["count"] = packed.start_P, packed.count_P
    staging = Path(job.work) / "staging"
    for suffix, records in (("rows", rows), ("pieces", pieces)):
        with atomic_writer(job.file(suffix), staging) as file:
            file.write(records.tobytes())
    counts = WindowCounts(
        num_rows=len(rows),
        num_pieces=len(pieces),
        num_padding=int(len(rows) * capacity - length_N.sum()),
        num_cut=int((length_N > capacity).sum()),
        num_cut_if_concatenated=num_cut_if_concatenated(start_N, length_N, job.seq_len),
    )
    write_json(job.file("json"), asdict(counts), staging)
    return counts


def _documents(job: Window) -> Iterator[tuple[Ints, Ints]]:
    """Yield start and length of the documents of each stretch, places counted over the split."""
    for stretch in job.stretches:
        starts = np.memmap(stretch.records, UNIT_RECORD, mode="r")["start"]
        edges = np.array(starts[stretch.first : stretch.stop + 1], dtype=np.int64)
        if stretch.stop == len(starts):
            edges = np.append(edges, stretch.tokens.num_tokens)
        yield edges[:-1] + stretch.offset, np.diff(edges)


def write_packing_files(
    output: Path, splits: Mapping[str, PackedSplit], staging: Path
) -> dict[str, SideFile]:
    """Write what is told of the rows beside the shards. Memory: the records of one window."""
    files = {}
    for split, packed in splits.items():
        num_pieces = sum(count.num_pieces for count in packed.counts)
        pieces = (w.records("pieces", PIECE) for w in _filled(packed))
        for name, count, parts, dtype in (
            (ROWS_NAME, packed.num_rows, _merged_rows(packed), ROW),
            (PIECES_NAME, num_pieces, pieces, PIECE),
        ):
            path = f"{split}/{name}"
            files[path] = write_records(output / path, count, parts, staging, dtype)
    return files


def _filled(packed: PackedSplit) -> list[Window]:
    # An empty file cannot be mapped.
    pairs = zip(packed.windows, packed.counts, strict=True)
    return [window for window, count in pairs if count.num_rows]


def _merged_rows(packed: PackedSplit) -> Iterator[Records]:
    before = 0
    for window, count in zip(packed.windows, packed.counts, strict=True):
        if count.num_rows:
            rows = np.array(window.records("rows", ROW))
            rows["first_piece"] += before
            yield rows
        before += count.num_pieces


@dataclass(frozen=True)
class PackedRowsJob(ShardJob):
    """A shard of rows with padding.

    windows: each with its first row in the shard and the number of its rows there. token_dtype: of
    the token files. padding_id: what follows a row's tokens.
    """

    windows: tuple[tuple[Window, int, int], ...]
    token_dtype: str
    padding_id: int

    @property
    def key(self) -> str:
        """Differs wherever the content of the shard might."""
        windows = [[window.key, first, count] for window, first, count in self.windows]
        return digest([asdict(self.layout), self.first_sequence, windows, self.padding_id])

    @property
    def num_bytes(self) -> int:
        """Of the rows, for progress."""
        num_rows = sum(count for _, _, count in self.windows)
        return num_rows * (self.layout.seq_len + 1) * ITEM_SIZES[self.layout.dtype]

    def sequences(self) -> NDArray[Any]:
        """Return the shard's sequences (N, T + 1), of which no two have a token in common."""
        parts = [self._rows(*window) for window in self.windows]
        return np.concatenate(parts)

    def _rows(self, window: Window, first: int, count: int) -> NDArray[Any]:
        dtype = np.dtype(self.layout.dtype).newbyteorder("<")
        token_dtype = np.dtype(self.token_dtype).newbyteorder("<")
        rows, pieces = window.records("rows", ROW), window.records("pieces", PIECE)
        tokens_NT = np.full((count, self.layout.seq_len + 1), self.padding_id, dtype)
        edges = rows["first_piece"][first : first + count + 1].astype(np.int64)
        if first + count == len(rows):
            edges = np.append(edges, len(pieces))
        part = pieces[edges[0] : edges[-1]]
        start_P, count_P = part["start"].astype(np.int64), part["count"].astype(np.int64)
        row_P = np.repeat(np.arange(count), np.diff(edges))
        before_P = np.cumsum(count_P) - count_P
        place_P = before_P - before_P[edges[:-1] - edges[0]][row_P]
        files = [stretch.tokens for stretch in window.stretches]
        offsets = [stretch.offset for stretch in window.stretches]
        # In the order of the files, one open at a time: a shard has pieces of all of its window.
        opened, tokens = -1, np.empty(0, token_dtype)
        for number in np.argsort(start_P, kind="stable").tolist():
            start, length, place = int(start_P[number]), int(count_P[number]), int(place_P[number])
            owner = bisect_right(offsets, start) - 1
            if owner != opened:
                opened, tokens = owner, np.memmap(files[owner].path, token_dtype, mode="r")
            inside = start - offsets[owner]
            tokens_NT[row_P[number], place : place + length] = tokens[inside : inside + length]
        return tokens_NT


def plan_row_shards(
    packed: PackedSplit,
    layout: PackLayout,
    directory: Path,
    work: Path,
    token_dtype: str,
    padding_id: int,
) -> list[ShardJob]:
    """Return the jobs that write the rows to ``directory/shard-000000.tar`` and so on."""
    ends = list(accumulate((count.num_rows for count in packed.counts), initial=0))
    jobs: list[ShardJob] = []
    for number, first in enumerate(range(0, packed.num_rows, layout.sequences_per_shard)):
        last = min(first + layout.sequences_per_shard, packed.num_rows)
        windows = []
        place = bisect_right(ends, first) - 1
        while place < len(packed.windows) and ends[place] < last:
            begin, stop = max(first, ends[place]), min(last, ends[place + 1])
            if stop > begin:
                windows.append((packed.windows[place], begin - ends[place], stop - begin))
            place += 1
        path = str(directory / f"shard-{number:06d}.tar")
        jobs.append(
            PackedRowsJob(path, str(work), layout, first, tuple(windows), token_dtype, padding_id)
        )
    return jobs
