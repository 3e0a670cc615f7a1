"""What is stored of packed sequences beside the shards: their lengths, and what is in them.

``train/rows.npy`` and ``valid/rows.npy`` have one record a stored sequence, in the order of the
sequences; ``pieces.npy`` beside them one record a piece of a document, in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modtrain.common.errors import DataError
from modtrain.common.reading import UnreadableError, open_regular
from modtrain.data.packing.best_fit import Ints
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.prepared import DAMAGED, PIECES_NAME, ROWS_NAME

ROW = np.dtype([("first_piece", "<u8"), ("length", "<u4")])
"""first_piece: number of its first piece in ``pieces.npy``. length: tokens; padding follows."""
PIECE = np.dtype([("start", "<u8"), ("count", "<u4")])
"""start: the first token's place in the split's tokens, documents end to end. count: tokens."""


class RowTable:
    """The rows of one split. A file is mapped when it is first asked for, in each process."""

    def __init__(
        self, index: ShardIndex, split: str, find: Callable[[ShardIndex, str], Path]
    ) -> None:
        """Find the rows' lengths.

        find: returns where a side file of the index lies; behind a URL it is fetched.
        Raises DataError.
        """
        self._index, self._split, self._find = index, split, find
        self._num_rows = index.summary.splits[split].num_sequences
        self._capacity = index.summary.seq_len + 1
        self._arrays: dict[str, NDArray[Any]] = {}
        self._mapped(ROWS_NAME, ROW)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_arrays": {}}

    def lengths(self, numbers: Ints) -> Ints:
        """Return how many tokens the rows ``numbers`` have. Raises DataError."""
        lengths: Ints = self._mapped(ROWS_NAME, ROW)["length"][numbers].astype(np.int64)
        if lengths.size and not 1 <= lengths.min() <= lengths.max() <= self._capacity:
            self._fail(ROWS_NAME, f"has a length outside 1 to {self._capacity}")
        return lengths

    def pieces(self, number: int) -> list[tuple[int, int]]:
        """Return the place of the first token and the number of tokens of a row's pieces."""
        rows, pieces = self._mapped(ROWS_NAME, ROW), self._mapped(PIECES_NAME, PIECE)
        first = int(rows["first_piece"][number])
        is_last = number + 1 == len(rows)
        stop = len(pieces) if is_last else int(rows["first_piece"][number + 1])
        if not first < stop <= min(len(pieces), first + self._capacity):
            self._fail(ROWS_NAME, f"row {number} is damaged")
        return [(int(piece["start"]), int(piece["count"])) for piece in pieces[first:stop]]

    def _mapped(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        if name not in self._arrays:
            path = self._path(name)
            try:
                with open_regular(path):
                    array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (UnreadableError, OSError, ValueError, EOFError) as error:
                raise DataError(f"{path}: cannot be read ({error}). {DAMAGED}") from None
            is_table = isinstance(array, np.ndarray) and array.dtype == dtype and array.ndim == 1
            if not is_table or (name == ROWS_NAME and len(array) != self._num_rows):
                self._fail(name, "has not the records of the index")
            self._arrays[name] = array
        return self._arrays[name]

    def _path(self, name: str) -> Path:
        full = f"{self._split}/{name}"
        path = self._find(self._index, full)
        size = path.stat().st_size if path.is_file() else None
        if size != self._index.side_files[full].num_bytes:
            reason = "is missing" if size is None else f"has {size} bytes"
            self._fail(name, f"{reason}, not {self._index.side_files[full].num_bytes} bytes")
        return path

    def _fail(self, name: str, reason: str) -> None:
        raise DataError(f"{self._index.location}/{self._split}/{name}: {reason}. {DAMAGED}")
