"""Best-fit packing of documents against its promises and a slow reference."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modtrain.data.packing.best_fit import (
    best_fit_rows,
    num_cut_if_concatenated,
    pack_documents,
)
from modtrain.data.packing.summary import SplitPacking, padding_share
from modtrain.data.prepare import packed_rows
from modtrain.data.prepare.pack import PackLayout, TokenFile
from modtrain.data.prepare.packed_rows import PackedSplit, Window, WindowCounts, plan_row_shards

QUICK = settings(max_examples=20, deadline=None, derandomize=True)
lengths = st.lists(st.integers(1, 40), max_size=60)
capacities = st.integers(1, 16)


def documents(length_list: list[int]) -> tuple[np.ndarray, np.ndarray]:
    length_N = np.array(length_list, dtype=np.int64)
    return np.cumsum(length_N) - length_N, length_N


@QUICK
@given(lengths, capacities)
def test_every_token_stands_in_one_row(length_list: list[int], capacity: int) -> None:
    start_N, length_N = documents(length_list)
    packed = pack_documents(start_N, length_N, capacity)
    places = [
        place
        for start, count in zip(packed.start_P.tolist(), packed.count_P.tolist(), strict=True)
        for place in range(start, start + count)
    ]
    assert sorted(places) == list(range(sum(length_list)))
    assert packed.length_R.sum() == len(places)
    assert all(1 <= length <= capacity for length in packed.length_R.tolist())


@QUICK
@given(lengths, capacities)
def test_only_longer_documents_are_cut(length_list: list[int], capacity: int) -> None:
    start_N, length_N = documents(length_list)
    packed = pack_documents(start_N, length_N, capacity)
    number_P = np.searchsorted(start_N, packed.start_P, side="right") - 1
    pieces = Counter(number_P.tolist())
    expected = {number: -(-length // capacity) for number, length in enumerate(length_list)}
    assert pieces == expected
    # All pieces of a document but its last one fill a row.
    for number, start, count in zip(number_P, packed.start_P, packed.count_P, strict=True):
        is_last = start + count == start_N[number] + length_N[number]
        assert count == capacity or is_last


@QUICK
@given(lengths, capacities)
def test_rows_and_pieces_are_in_order(length_list: list[int], capacity: int) -> None:
    packed = pack_documents(*documents(length_list), capacity)
    starts = [packed.start_P[first] for first in packed.first_R]
    assert starts == sorted(starts)
    edges = [*packed.first_R.tolist(), len(packed.start_P)]
    for first, stop in pairwise(edges):
        own = packed.start_P[first:stop].tolist()
        assert own
        assert own == sorted(own)


@QUICK
@given(lengths, capacities)
def test_at_most_one_row_is_half_empty(length_list: list[int], capacity: int) -> None:
    """Two such rows would be one: so there are fewer than twice as many rows as needed."""
    packed = pack_documents(*documents(length_list), capacity)
    assert (2 * packed.length_R <= capacity).sum() <= 1
    assert len(packed.length_R) <= 2 * sum(length_list) / capacity + 1


def slow_best_fit(length_list: list[int], capacity: int) -> list[int]:
    """Return how many places are free in each row: best-fit decreasing as the paper has it."""
    free_places: list[int] = []
    for length in sorted(length_list, reverse=True):
        fitting = [free for free in free_places if free >= length]
        if fitting:
            free_places.remove(min(fitting))
        free_places.append((min(fitting) if fitting else capacity) - length)
    return sorted(free_places)


@QUICK
@given(
    st.integers(1, 30).flatmap(
        lambda c: st.tuples(st.lists(st.integers(1, c), max_size=80), st.just(c))
    )
)
def test_rows_are_those_of_the_slow_reference(case: tuple[list[int], int]) -> None:
    length_list, capacity = case
    row_P = best_fit_rows(np.array(length_list, dtype=np.int64), capacity)
    filled = np.bincount(row_P, weights=length_list or None)
    assert sorted((capacity - filled).astype(int).tolist()) == slow_best_fit(length_list, capacity)


@QUICK
@given(lengths, capacities)
def test_rows_do_not_depend_on_where_the_documents_are(
    length_list: list[int], capacity: int
) -> None:
    start_N, length_N = documents(length_list)
    packed, moved = (pack_documents(start_N + d, length_N, capacity) for d in (0, 10**12))
    assert (moved.start_P - 10**12 == packed.start_P).all()
    assert (moved.length_R == packed.length_R).all()


@QUICK
@given(lengths, st.integers(1, 16))
def test_documents_cut_by_concatenation_are_counted(length_list: list[int], seq_len: int) -> None:
    start_N, length_N = documents(length_list)
    whole = sum(
        any(
            first <= start and start + length <= first + seq_len + 1
            for first in range(0, sum(length_list), seq_len)
        )
        for start, length in zip(start_N.tolist(), length_list, strict=True)
    )
    assert num_cut_if_concatenated(start_N, length_N, seq_len) == len(length_list) - whole


def test_share_of_padding() -> None:
    # Rows of 8 + 1 places with 9 and 5 tokens train on 8 and 4 of their 8.
    assert padding_share(2, 8, SplitPacking(4, 0, 0)) == 4 / 16
    assert padding_share(2, 8, None) == 0


@QUICK
@given(st.lists(st.integers(0, 7), min_size=1, max_size=8), st.integers(1, 3), st.integers(1, 3))
def test_shards_have_every_row_once(
    rows_by_window: list[int], sequences: int, samples: int
) -> None:
    """Shards begin and end within windows."""
    counts = [WindowCounts(count, count, 0, 0, 0) for count in rows_by_window]
    windows = [Window((), 8, str(number)) for number in range(len(counts))]
    layout, here = PackLayout(8, sequences, samples, "uint16"), Path()
    jobs = plan_row_shards(PackedSplit(windows, counts), layout, here, here, "uint16", 300)
    read = [
        (window.work, row)
        for job in jobs
        for window, first, count in job.windows
        for row in range(first, first + count)
    ]
    assert read == [(str(n), row) for n, c in enumerate(rows_by_window) for row in range(c)]
    assert all(
        sum(count for *_, count in job.windows) == layout.sequences_per_shard for job in jobs[:-1]
    )


class UnitRecords:
    """Stands for the documents of a unit."""

    def __init__(self, number: int, num_documents: int) -> None:
        self.path, self.num_documents = str(number), num_documents


@QUICK
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), max_size=10),
    st.integers(1, 8),
    st.integers(1, 60),
)
def test_windows_have_every_document_once_and_are_bounded(
    units: list[tuple[int, int]], most: int, most_tokens: int
) -> None:
    """units: documents, and tokens of each document."""
    files = [TokenFile(str(n), c * each, str(n)) for n, (c, each) in enumerate(units)]
    records = [UnitRecords(n, c) for n, (c, _) in enumerate(units)]
    windows = packed_rows.plan_windows(
        files,
        records,
        8,
        Path(),
        most,
        most_tokens,  # type: ignore[arg-type]
    )
    read = [
        (stretch.records, number)
        for window in windows
        for stretch in window.stretches
        for number in range(stretch.first, stretch.stop)
    ]
    assert read == [(str(n), d) for n, (c, _) in enumerate(units) for d in range(c)]
    for window in windows:
        counts = [stretch.stop - stretch.first for stretch in window.stretches]
        sizes = [units[int(s.records)][1] for s in window.stretches]
        assert sum(counts) <= most
        num_tokens = sum(c * size for c, size in zip(counts, sizes, strict=True))
        # One document is never cut by a window.
        assert num_tokens <= most_tokens + max(sizes)


@pytest.mark.parametrize("capacity", [1, 7])
def test_nothing_to_pack(capacity: int) -> None:
    packed = pack_documents(*documents([]), capacity)
    assert len(packed.first_R) == len(packed.start_P) == 0
