"""Counts, lengths of documents, use of the vocabulary, and documents seen twice.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modtrain.data.documents.table import DocumentTable, find_repeats
from modtrain.data.packing.summary import SplitPacking
from modtrain.data.stream.batch import PADDING
from modtrain.data.stream.dataset import TokenDataset
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.prepared import SPLITS, SplitSummary

# Samples read in one go.
_READ = 256
# Copies whose hashes are counted to name the documents with the most of them.
_COUNTED_REPEATS = 1 << 20
_MOST_REPEATED = 5

Lengths = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Distinct lengths, rising, and how many documents have each."""


@dataclass(frozen=True)
class SplitStatistics:
    """What is in one split of one source.

    lengths: of documents in tokens, end tokens included; None: unknown. num_repeats: documents
    whose text stands in an earlier one of the same split, of any source; None: unknown, as an
    earlier version prepared the data. counts_V: how often each token occurs in num_read tokens of
    the sequences; of all of them where is_whole. packing: None: documents are laid end to end.
    """

    source: str
    split: str
    summary: SplitSummary
    lengths: Lengths | None
    num_repeats: int | None
    counts_V: NDArray[np.int64]
    num_read: int
    is_whole: bool
    packing: SplitPacking | None = None

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token, end tokens included."""
        return self.summary.num_bytes / max(1, self.summary.num_tokens)


@dataclass(frozen=True)
class Repeated:
    """A text that several documents have. origin: file and line of a copy that is not the first."""

    origin: str
    num_documents: int


@dataclass(frozen=True)
class Statistics:
    """What is in all splits, and the documents with the most copies."""

    splits: list[SplitStatistics]
    most_repeated: list[Repeated]


def statistics_of(
    indexes: Mapping[str, ShardIndex], data: Mapping[str, Mapping[str, TokenDataset]], most: int
) -> Statistics:
    """Read the data of each source. most: tokens of each split that are read, evenly spread.

    indexes, data: by source; data by split as well. Memory: 24 bytes a token of the vocabulary and
    split, and what `find_repeats` takes.

    Raises DataError where they are missing or damaged.
    """
    tables = {
        (source, split): DocumentTable.open(index, split)
        for source, index in indexes.items()
        for split in SPLITS
    }
    known = {place: table for place, table in tables.items() if table is not None}
    repeats: dict[tuple[str, str], NDArray[np.bool_]] = {}
    for split in SPLITS:
        # With split_at=line a document has a part in either split.
        own = [place for place in known if place[1] == split]
        records = [known[place].records for place in own]
        marks = find_repeats([len(r) for r in records], [r["hash"] for r in records].__getitem__)
        repeats |= zip(own, marks, strict=True)
    splits = []
    for (source, split), table in tables.items():
        index, samples = indexes[source], data[source][split]
        summary = index.summary.splits[split]
        counts_V, num_read, scanned = _scan(samples, index, most)
        packing = (index.summary.packing or {}).get(split)
        least = len(samples) * samples.seq_len if packing is None else summary.num_tokens
        is_whole = num_read >= least
        lengths = _distinct(table.lengths() if table else [scanned] if is_whole else [])
        marked = repeats.get((source, split))
        num_repeats = None if marked is None else int(marked.sum())
        splits.append(
            SplitStatistics(
                source, split, summary, lengths, num_repeats, counts_V, num_read, is_whole, packing
            )
        )
    return Statistics(splits, _most_repeated(known, repeats))


def _scan(
    samples: TokenDataset, index: ShardIndex, most: int
) -> tuple[NDArray[np.int64], int, NDArray[np.int64]]:
    """Count the tokens of samples that are evenly spread, and measure documents within them."""
    counts_V = np.zeros(index.summary.vocab_size, dtype=np.int64)
    total, seq_len = len(samples), samples.seq_len
    wanted = min(total, max(1, most // seq_len))
    numbers = np.arange(wanted) * total // max(1, wanted)
    pieces: list[NDArray[np.int64]] = [np.array([-1])]
    if samples.has_padding:
        # No token is in two samples, and a document that is cut not in one piece.
        for first in range(0, wanted, _READ):
            tokens = samples.__getitems__(numbers[first : first + _READ].tolist()).numpy()
            counts_V += np.bincount(tokens[tokens != PADDING], minlength=len(counts_V))
        return counts_V, int(counts_V.sum()), np.empty(0, np.int64)
    for first in range(0, wanted, _READ):
        own = numbers[first : first + _READ].tolist()
        tokens = samples.__getitems__(own)[:, :-1].numpy().ravel()
        counts_V += np.bincount(tokens, minlength=len(counts_V))
        pieces.append(np.flatnonzero(tokens == index.summary.eos_id) + first * seq_len)
    if wanted:
        # The last target is the first token of no sample.
        counts_V[int(samples[total - 1][-1])] += 1
    ends = np.concatenate(pieces)
    return counts_V, wanted * seq_len, ends[1:] - ends[:-1]


def _distinct(pieces: Iterable[NDArray[np.int64]]) -> Lengths | None:
    """Count equal lengths: there are few distinct ones, however many documents."""
    counted: dict[int, int] = {}
    for piece in pieces:
        values, counts = np.unique(piece, return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            counted[value] = counted.get(value, 0) + count
    if not counted:
        return None
    values = np.array(sorted(counted), dtype=np.int64)
    return values, np.array([counted[value] for value in values.tolist()], dtype=np.int64)


def length_quantiles(lengths: Lengths, shares: Sequence[float]) -> list[int]:
    """The smallest length that so large a share of the documents does not exceed."""
    values, counts = lengths
    cumulative = np.cumsum(counts)
    places = np.searchsorted(cumulative, np.array(shares) * cumulative[-1])
    chosen: list[int] = values[np.minimum(places, len(values) - 1)].tolist()
    return chosen


def unused_tokens(splits: Sequence[SplitStatistics]) -> NDArray[np.int64]:
    """The tokens of the vocabulary that occur in none of the splits."""
    return np.flatnonzero(np.sum([split.counts_V for split in splits], axis=0) == 0)


def _most_repeated(
    tables: Mapping[tuple[str, str], DocumentTable],
    repeats: Mapping[tuple[str, str], NDArray[np.bool_]],
) -> list[Repeated]:
    """The texts with the most documents, of the first million copies."""
    copies = list(_copies(tables, repeats))
    if not copies:
        return []
    hashes = np.concatenate([table.records["hash"][own] for table, own in copies])
    _, first, counts = np.unique(hashes, axis=0, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))[:_MOST_REPEATED]
    starts = np.cumsum([0, *(len(own) for _, own in copies)])
    repeated = []
    for place in first[order].tolist():
        number = int(np.searchsorted(starts, place, side="right")) - 1
        table, own = copies[number]
        repeated.append(table.origin(int(own[place - starts[number]])))
    return [
        Repeated(f"{file}:{line}", count + 1)
        for (file, line), count in zip(repeated, counts[order].tolist(), strict=True)
    ]


def _copies(
    tables: Mapping[tuple[str, str], DocumentTable],
    repeats: Mapping[tuple[str, str], NDArray[np.bool_]],
) -> Iterator[tuple[DocumentTable, NDArray[np.int64]]]:
    left = _COUNTED_REPEATS
    for place, table in tables.items():
        own = np.flatnonzero(repeats[place])[:left]
        left -= len(own)
        if len(own):
            yield table, own
