"""The documents of a split, mapped from disk, and those that were seen before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modtrain.common.atomic_io import file_sha256
from modtrain.common.errors import DataError
from modtrain.common.reading import UnreadableError, open_regular, read_json
from modtrain.data.documents.record import RECORD, Records
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.prepared import DAMAGED, DOCUMENTS_NAME, SOURCE_FILES_NAME

# Records looked at in one go, and documents whose hashes are sorted in one go: some 60 bytes each.
_CHUNK = 1 << 20
_SORTED = 1 << 24


@dataclass(frozen=True)
class DocumentPart:
    """What a stretch of tokens has of a document.

    file: the source file's name; line: line, row or record in it, from 1. first, stop: which of its
    num_tokens tokens, end token included, are in the stretch. place: of the first one there.
    """

    file: str
    line: int
    first: int
    stop: int
    num_tokens: int
    place: int


class DocumentTable:
    """The records of one split."""

    def __init__(self, records: Records, files: Sequence[str], num_tokens: int) -> None:
        """num_tokens: of the whole split, with those that fill no sequence."""
        self.records = records
        self._files, self._num_tokens = files, num_tokens

    @classmethod
    def open(cls, index: ShardIndex, split: str) -> DocumentTable | None:
        """Map the records of a split; None: an earlier version prepared it, and kept none.

        Raises DataError where they are missing or not those of the index.
        """
        if not index.side_files:
            return None
        path = index.side_file(f"{split}/{DOCUMENTS_NAME}")
        expected = index.side_files[f"{split}/{DOCUMENTS_NAME}"]
        summary = index.summary.splits[split]
        try:
            with open_regular(path):
                size = path.stat().st_size
            if size != expected.num_bytes:
                raise DataError(f"{path}: has {size} bytes, not {expected.num_bytes}. {DAMAGED}")
            records = np.load(path, mmap_mode="r", allow_pickle=False)
        except (UnreadableError, OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: cannot be read ({error}). {DAMAGED}") from None
        if records.dtype != RECORD or records.shape != (summary.num_documents,):
            raise DataError(f"{path}: has not the {summary.num_documents} records. {DAMAGED}")
        return cls(records, _source_files(index), summary.num_tokens)

    def between(self, start: int, stop: int) -> Iterator[DocumentPart]:
        """The documents of the tokens [start, stop) of the split, in order.

        Raises DataError where the records contradict themselves.
        """
        starts = self.records["start"]
        number = max(0, int(np.searchsorted(starts, np.uint64(start), side="right")) - 1)
        while number < len(starts) and int(starts[number]) < stop:
            record = self.records[number]
            own = int(record["start"])
            last = number + 1 == len(starts)
            end = self._num_tokens if last else int(starts[number + 1])
            if not own < end <= self._num_tokens:
                raise DataError(f"{DOCUMENTS_NAME}: record {number} is damaged. {DAMAGED}")
            file, line = self.origin(number)
            first = max(start, own)
            yield DocumentPart(
                file=file,
                line=line,
                first=first - own,
                stop=min(stop, end) - own,
                num_tokens=end - own,
                place=first - start,
            )
            number += 1

    def origin(self, number: int) -> tuple[str, int]:
        """Source file and line of a document."""
        record = self.records[number]
        if int(record["file"]) >= len(self._files):
            raise DataError(f"{DOCUMENTS_NAME}: record {number} is damaged. {DAMAGED}")
        return self._files[int(record["file"])], int(record["line"])

    def lengths(self) -> Iterator[NDArray[np.int64]]:
        """Tokens of each document with its end token, in pieces."""
        for first in range(0, len(self.records), _CHUNK):
            starts = self.records["start"][first : first + _CHUNK + 1].astype(np.int64)
            ends = starts[1:]
            if first + _CHUNK >= len(self.records):
                ends = np.append(ends, self._num_tokens)
            yield ends - starts[: len(ends)]


def _source_files(index: ShardIndex) -> list[str]:
    path = index.side_file(SOURCE_FILES_NAME)
    expected = index.side_files[SOURCE_FILES_NAME]
    try:
        content = read_json(path, expected.num_bytes).get("files")
    except UnreadableError as error:
        raise DataError(f"{index.location}/{error}. {DAMAGED}") from None
    if file_sha256(path) != expected.sha256 or not isinstance(content, list):
        raise DataError(f"{path}: is not that of the index. {DAMAGED}")
    return [str(name) for name in content]


def find_repeats(
    counts: Sequence[int], hashes_of: Callable[[int], NDArray[Any]]
) -> list[NDArray[np.bool_]]:
    """Find the documents whose text stands in a record before, over all tables in their order.

    counts: records of each table. hashes_of: its number → its hashes (N, 2), read when asked for,
    since there may be more tables than files can be mapped at once.

    Returns a bool a record. Memory: that, and about 1 GB however many records there are, as long as
    no text stands there more than 16 million times; more records than that are read several times.
    """
    total = sum(counts)
    repeats = [np.zeros(count, dtype=np.bool_) for count in counts]
    bits = max(0, (total - 1).bit_length() - (_SORTED.bit_length() - 1)) if total else 0
    for part in range(1 << bits):
        hashes, places = [], []
        for number in range(len(counts)):
            for own_hashes, own in _of_part(hashes_of(number), part, bits):
                hashes.append(own_hashes)
                places.append((number, own))
        if hashes:
            _mark(np.concatenate(hashes), places, repeats)
    return repeats


def _of_part(
    hashes: NDArray[Any], part: int, bits: int
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """The hashes that begin with the bits ``part``, with the numbers of their records."""
    for first in range(0, len(hashes), _CHUNK):
        hashes_N2 = np.array(hashes[first : first + _CHUNK])
        own = np.arange(len(hashes_N2))
        if bits:
            own = np.flatnonzero(hashes_N2[:, 0] >> np.uint64(64 - bits) == np.uint64(part))
        yield hashes_N2[own], own + first


def _mark(
    hashes_N2: NDArray[Any],
    places: Sequence[tuple[int, NDArray[Any]]],
    repeats: Sequence[NDArray[np.bool_]],
) -> None:
    """Mark all but the first of equal hashes; they come in the order of the documents."""
    if not len(hashes_N2):
        return
    # Stable: of equal ones the first stays the first.
    order = np.lexsort((hashes_N2[:, 1], hashes_N2[:, 0]))
    is_repeat = np.zeros(len(order), dtype=np.bool_)
    is_repeat[order[1:]] = (hashes_N2[order[1:]] == hashes_N2[order[:-1]]).all(axis=1)
    start = 0
    for table, own in places:
        repeats[table][own[is_repeat[start : start + len(own)]]] = True
        start += len(own)
