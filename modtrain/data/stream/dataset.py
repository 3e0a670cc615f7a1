"""Sample number → tokens, straight from the tar shards.

Legend: B batch, S tokens trained on in a sample, T those in a stored sequence, M tar members.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from modtrain.common.errors import DataError, raise_if_any
from modtrain.data.config import packed_len_problems, seq_len_problems
from modtrain.data.packing.rows import RowTable
from modtrain.data.stream.batch import PADDING
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.prepared import ITEM_SIZES

_NPY_MAGIC = b"\x93NUMPY\x01\x00"
# Of a version 1.0 header of a two-dimensional array, with room to spare.
_HEADER_BYTES = 512


class TokenDataset(Dataset[Tensor]):
    """The samples of one split: number n → int64 tensor (S + 1,), inputs and last target.

    A stored sequence of T tokens gives T / S samples. Where documents are packed by best fit it
    gives one, which may end with `PADDING`. Shards are mapped into memory when first
    read, in each process for itself; a pickled data set carries none of that.
    """

    def __init__(self, index: ShardIndex, split: str, seq_len: int | None = None) -> None:
        stored = index.summary.seq_len
        self.seq_len = seq_len or stored
        raise_if_any(
            seq_len_problems("data.seq_len", self.seq_len, stored)
            or packed_len_problems("data.seq_len", self.seq_len, {"": index.summary})
        )
        self._stored_len = stored
        self._parts = stored // self.seq_len
        self._dtype = np.dtype(index.summary.dtype).newbyteorder("<")
        self._item_size = ITEM_SIZES[index.summary.dtype]
        self._vocab_size = index.summary.vocab_size
        self._padding_id = index.summary.padding_id
        is_packed = index.summary.packing is not None
        self._row_table = RowTable(index, split, self._side_file()) if is_packed else None
        self._open(index, split)

    def _side_file(self) -> Callable[[ShardIndex, str], Path]:
        """Return what finds a side file of an index."""
        return ShardIndex.side_file

    def _open(self, index: ShardIndex, split: str) -> None:
        """Build the lookup tables of the shards' samples."""
        shards = index.shards[split]
        self._paths = [index.shard_path(split, shard) for shard in shards]
        self._sizes = [shard.num_bytes for shard in shards]
        members = [(s, *member) for s, shard in enumerate(shards) for member in shard.members]
        # Arrays: small with millions of members, and faster than numpy to read one by one.
        self._shard_M = array("q", [shard for shard, _, _ in members])
        self._offset_M = array("q", [offset for _, offset, _ in members])
        self._count_M = array("q", [count for _, _, count in members])
        # The index guarantees that all members but the last are of the first one's size.
        self._samples_per_member = self._count_M[0] * self._parts if members else 1
        self._num_samples = sum(self._count_M) * self._parts
        self._forget()

    def _forget(self) -> None:
        self._maps: dict[int, NDArray[Any]] = {}
        # Item in the shard at which a member's tokens begin; -1 until its header was checked.
        self._first_item_M = array("q", [-1]) * len(self._offset_M)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_maps", "_first_item_M")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, number: int) -> Tensor:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> Tensor:
        """Samples ``numbers`` as one int64 tensor (B, S + 1); what a DataLoader calls.

        Raises IndexError outside the split, DataError where a shard is not what its index says, or
        has a token that the tokenizer does not have.
        """
        if numbers and not 0 <= min(numbers) <= max(numbers) < self._num_samples:
            raise IndexError(f"samples {numbers} of {self._num_samples}")
        # Two passes beat one that converts as it copies: the first waits for memory alone.
        stored = np.concatenate(self._rows(numbers))
        if self._row_table is None:
            self._check_tokens(numbers, stored)
            return torch.from_numpy(stored.astype(np.int64).reshape(-1, self.seq_len + 1))
        length_B = self._row_table.lengths(np.asarray(numbers, dtype=np.int64))
        stored_BT = stored.reshape(-1, self.seq_len + 1)
        is_padding_BT = np.arange(self.seq_len + 1) >= length_B[:, None]
        self._check_padding(numbers, stored_BT, is_padding_BT)
        self._check_tokens(numbers, np.where(is_padding_BT, 0, stored_BT))
        return torch.from_numpy(np.where(is_padding_BT, PADDING, stored_BT.astype(np.int64)))

    @property
    def has_padding(self) -> bool:
        """Whether samples may end with padding."""
        return self._row_table is not None

    def num_targets(self, numbers: NDArray[np.int64]) -> int:
        """Return how many tokens of the samples ``numbers`` are predicted; no shard is read."""
        if self._row_table is None:
            return len(numbers) * self.seq_len
        return int(self._row_table.lengths(numbers).sum()) - len(numbers)

    def document_pieces(self, number: int) -> list[tuple[int, int]]:
        """Return the stretches of the split's tokens, documents end to end, in a sample.

        Each by its first token's place and its number of tokens.
        """
        if self._row_table is None:
            return [(number * self.seq_len, self.seq_len + 1)]
        return self._row_table.pieces(number)

    def _rows(self, numbers: list[int]) -> list[NDArray[Any]]:
        """Return the stored tokens of each sample."""
        length = self.seq_len + 1
        rows = []
        # One row after the other: numpy's overhead on arrays of a batch's size costs more.
        for number in numbers:
            shard, start = self._locate(number)
            rows.append(self._maps[shard][start : start + length])
        return rows

    def _check_tokens(self, numbers: list[int], stored: NDArray[Any]) -> None:
        if not stored.size or stored.max() < self._vocab_size:
            return
        stored_BT = stored.reshape(len(numbers), -1)
        row, place = np.argwhere(stored_BT >= self._vocab_size)[0].tolist()
        path, first = self.locate(numbers[row])
        raise DataError(
            f"{path}: token {place} of sample {numbers[row]}, at byte"
            f" {first + place * self._item_size}, is {stored_BT[row, place]}; the tokenizer has"
            f" {self._vocab_size}. The shard is damaged: data.verify=sha256 checks every shard;"
            " copy it again."
        )

    def _check_padding(
        self, numbers: list[int], stored_BT: NDArray[Any], is_padding_BT: NDArray[np.bool_]
    ) -> None:
        is_wrong_B = ((stored_BT == self._padding_id) != is_padding_BT).any(axis=1)
        if is_wrong_B.any():
            number = numbers[int(is_wrong_B.argmax())]
            raise DataError(
                f"{self.locate(number)[0]}: sample {number} does not end where rows.npy says."
                " data.verify=sha256 checks every file; copy the prepared directory again."
            )

    def locate(self, number: int) -> tuple[Path | str, int]:
        """Return the path or the URL of a sample's shard, and the byte of its first token there."""
        shard, start = self._locate(number)
        return self._paths[shard], start * self._item_size

    def source_of(self, number: int) -> tuple[str, int]:
        """Return the name of a sample's source, which is empty: there is one; and its number."""
        return "", number

    def _locate(self, number: int) -> tuple[int, int]:
        """Return a sample's shard, which is mapped then, and its first item in it."""
        member, inside = divmod(number, self._samples_per_member)
        start = self._first_item_M[member]
        if start < 0:
            start = self._first_item_M[member] = self._checked_first_item(member)
        # A sample starts every S tokens; each stored sequence ends with a token of the next.
        return self._shard_M[member], start + inside * self.seq_len + inside // self._parts

    def _checked_first_item(self, member: int) -> int:
        """Where a member's tokens begin, in items, after a look at its .npy header."""
        shard, offset = self._shard_M[member], self._offset_M[member]
        if shard not in self._maps:
            # Items of the tokens' type: tar pads files to whole blocks of 512 bytes.
            content = _mapped(self._paths[shard], self._sizes[shard])
            self._maps[shard] = content.view(self._dtype)
        content = self._maps[shard].view(np.uint8)
        header = content[offset : offset + _HEADER_BYTES].tobytes()
        expected = ((self._count_M[member], self._stored_len + 1), False, self._dtype)
        # The header alone is read and nothing unpickled: the tokens are plain numbers.
        stream = io.BytesIO(header)
        stream.seek(len(_NPY_MAGIC))
        try:
            has_magic = header.startswith(_NPY_MAGIC)
            actual = np.lib.format.read_array_header_1_0(stream) if has_magic else None
        except ValueError:
            actual = None
        first_byte = offset + stream.tell()
        last_byte = first_byte + expected[0][0] * expected[0][1] * self._item_size
        if actual != expected or first_byte % self._item_size or last_byte > len(content):
            raise DataError(
                f"{self._paths[shard]}: no tokens of shape {expected[0]} at byte {offset}; "
                "the shard is damaged. data.verify=sha256 checks every shard; copy it again."
            )
        return first_byte // self._item_size


def _mapped(path: Path, size: int) -> NDArray[np.uint8]:
    """The bytes of a file, mapped privately. Unlike np.memmap it keeps no file open."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes != size:
            raise DataError(f"{path}: has {num_bytes} bytes, not {size}. Copy the directory again.")
        tensor = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    content: NDArray[np.uint8] = tensor.numpy()
    return content
