"""Best-fit packing: documents are cut only where they are longer than a sequence.

"Fewer Truncations Improve Language Modeling", arXiv 2404.10830, section 3: pieces of a document are
as long as a sequence, except the last one. The longest pieces come first, each goes where it leaves
the least room, and a new sequence begins where it fits in none (best-fit decreasing).

Legend: N documents, P pieces of documents, R rows, each of which is a stored sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class PackedRows(NamedTuple):
    """The rows of a list of documents, in the order of the first token of each.

    start_P, count_P: the pieces by row and, within it, in the documents' order: the place of the
    first token of each, and how many there are. first_R: number of the row's first piece. length_R:
    tokens of the row.
    """

    start_P: Ints
    count_P: Ints
    first_R: Ints
    length_R: Ints


def pack_documents(start_N: Ints, length_N: Ints, capacity: int) -> PackedRows:
    """Pack documents into rows of at most ``capacity`` tokens.

    start_N, length_N: place of the first token of each document, rising, and tokens of each. The
    rows depend on nothing else. Memory: some 100 bytes a document and a row.
    """
    num_full_N, rest_N = np.divmod(length_N, capacity)
    number_P = np.repeat(np.arange(len(length_N)), num_full_N)
    before_P = np.arange(len(number_P)) - np.repeat(np.cumsum(num_full_N) - num_full_N, num_full_N)
    has_rest_N = rest_N > 0
    row_of_rest = best_fit_rows(rest_N[has_rest_N], capacity)
    num_rest_rows = int(row_of_rest.max(initial=-1)) + 1
    start_P = np.concatenate(
        [(start_N + num_full_N * capacity)[has_rest_N], start_N[number_P] + before_P * capacity]
    )
    count_P = np.concatenate([rest_N[has_rest_N], np.full(len(number_P), capacity)])
    row_P = np.concatenate([row_of_rest, num_rest_rows + np.arange(len(number_P))])
    first_start_R = np.full(num_rest_rows + len(number_P), np.iinfo(np.int64).max)
    np.minimum.at(first_start_R, row_P, start_P)
    order_P = np.lexsort((start_P, first_start_R[row_P]))
    start_P, count_P, row_P = start_P[order_P], count_P[order_P], row_P[order_P]
    first_R = np.flatnonzero(np.diff(row_P, prepend=-1))
    length_R = np.add.reduceat(count_P, first_R) if len(first_R) else np.empty(0, np.int64)
    return PackedRows(start_P, count_P, first_R, length_R)


def best_fit_rows(length_P: Ints, capacity: int) -> Ints:
    """Return the row of each piece by best-fit decreasing; rows are numbered as they are begun.

    length_P: tokens of each, 1 to ``capacity``. Of rows with equal room any may be taken: it has no
    influence on how many there will be.
    """
    order_P = np.argsort(-length_P, kind="stable")
    lengths, counts = np.unique(length_P, return_counts=True)
    # Of the pieces from the longest to the shortest.
    rows: list[int] = []
    # By the places that are free in them, with a bit for each number that there is: the least one
    # that suffices is found without a search.
    rows_by_free: list[list[int]] = [[] for _ in range(capacity)]
    free_bits = 0
    num_rows = 0
    for length, count in zip(lengths[::-1].tolist(), counts[::-1].tolist(), strict=True):
        waiting = count
        while waiting:
            if fitting := free_bits >> length:
                free = length + (fitting & -fitting).bit_length() - 1
                row = rows_by_free[free].pop()
                if not rows_by_free[free]:
                    free_bits ^= 1 << free
            else:
                free, row = capacity, num_rows
                num_rows += 1
            # With one more piece of this length it is again the row with the least room.
            taken = min(waiting, free // length)
            rows += [row] * taken
            waiting -= taken
            left = free - taken * length
            if left:
                rows_by_free[left].append(row)
                free_bits |= 1 << left
    row_P = np.empty(len(length_P), dtype=np.int64)
    row_P[order_P] = rows
    return row_P


def num_cut_if_concatenated(start_N: Ints, length_N: Ints, seq_len: int) -> int:
    """How many of the documents would stand in several sequences if all were laid end to end.

    Such a sequence has its ``seq_len`` tokens, and the first one of the next.
    """
    return int((start_N % seq_len + length_N > seq_len + 1).sum())
