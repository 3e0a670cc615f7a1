"""Ragged rows of entries, each appended to, truncated and shifted independently.

Lengths are kept on the host, because control flow depends on them.

Shapes: B rows of the store, N rows of a batch, C allocated entries, L entries in use, K new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A store grows by a 32nd, and at least a page. Copying then costs 32 entries per token, little
# compared with attention, which reads all of them; and little memory is unused.
_PAGE = 16
_GROWTH = 32


class RaggedStore:
    """Ragged rows of entries, one row per sequence, in the order of their positions.

    window: how many positions back the next token reads; None: all. last: how many entries back.
    margin: by how many tokens `truncate` may go back; that many more are kept than the window or
    the last entries need.
    """

    def __init__(
        self, batch: int, window: int | None = None, last: int | None = None, margin: int = 0
    ) -> None:
        self.batch, self.window, self.last, self.margin = batch, window, last, margin
        self.lengths = [0] * batch
        self._fields: tuple[Tensor, ...] = ()
        # Allocated on the device of the first entries; documents when there are any.
        self._positions_BC = torch.zeros(batch, 0, dtype=torch.long)
        self._documents_BC: Tensor | None = None

    @property
    def allocated_length(self) -> int:
        """Entries per row that memory is allocated for."""
        return self._positions_BC.shape[1]

    def append(
        self,
        rows: Sequence[int],
        counts: Sequence[int],
        fields: tuple[Tensor, ...],
        positions_NK: Tensor,
        documents_NK: Tensor | None,
    ) -> None:
        """Add the first ``counts[i]`` of K new tokens to row ``rows[i]``; fields are (N, K, …)."""
        if not any(counts):
            return
        self._reserve(rows, counts, fields, positions_NK.device)
        new = [*fields, positions_NK]
        if documents_NK is not None and self._documents_BC is None:
            self._documents_BC = torch.zeros_like(self._positions_BC)
        if self._documents_BC is not None:
            new.append(torch.zeros_like(positions_NK) if documents_NK is None else documents_NK)
        starts = [self.lengths[row] for row in rows]
        length = positions_NK.shape[1]
        is_full = min(counts) == length
        if is_full and self.is_all_rows(rows) and min(starts) == max(starts):
            for buffer, values in zip(self._buffers(), new, strict=True):
                buffer[:, starts[0] : starts[0] + length].copy_(values)
        else:
            self._scatter(rows, starts, None if is_full else counts, new)
        for row, count in zip(rows, counts, strict=True):
            self.lengths[row] += count

    def _scatter(
        self,
        rows: Sequence[int],
        starts: list[int],
        counts: Sequence[int] | None,
        new: list[Tensor],
    ) -> None:
        """Write new tokens (N, K, …) at the end of each row; ``counts`` None: all K of each."""
        device, length = new[-1].device, new[-1].shape[1]
        row_N1 = torch.tensor(list(rows), device=device).unsqueeze(1)
        index_NK = torch.tensor(starts, device=device).unsqueeze(1)
        if length > 1:
            index_NK = index_NK + torch.arange(length, device=device)
        target = (row_N1.expand_as(index_NK), index_NK)
        if counts is not None:
            count_N1 = torch.tensor(list(counts), device=device).unsqueeze(1)
            is_valid_NK = torch.arange(length, device=device) < count_N1
            target = (target[0][is_valid_NK], index_NK[is_valid_NK])
            new = [values[is_valid_NK] for values in new]
        for buffer, values in zip(self._buffers(), new, strict=True):
            buffer.index_put_(target, values.to(buffer.dtype))

    def fields(self, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the fields (N, L, …) of these rows; views if it is one row, or all in order.

        Values behind a row's length are finite but meaningless.
        """
        return tuple(self._select(rows, field) for field in self._fields)

    def positions(self, rows: Sequence[int]) -> Tensor:
        """The position in the text of each entry of these rows (N, L)."""
        return self._select(rows, self._positions_BC)

    def documents(self, rows: Sequence[int]) -> Tensor:
        """The document number of each entry (N, L)."""
        if self._documents_BC is None:
            return torch.zeros_like(self.positions(rows))
        return self._select(rows, self._documents_BC)

    def _select(self, rows: Sequence[int], buffer: Tensor) -> Tensor:
        narrowed = buffer[:, : max([1, *(self.lengths[row] for row in rows)])]
        if len(rows) == 1:
            return narrowed[rows[0] : rows[0] + 1]
        if self.is_all_rows(rows):
            return narrowed
        index_N = torch.tensor(list(rows), device=buffer.device)
        return _heads_first(_heads_first(narrowed).index_select(0, index_N))

    def truncate(self, rows: Sequence[int], seen: Sequence[int]) -> None:
        """Drop the entries of row ``rows[i]`` at position ``seen[i]`` and later."""
        if not self.allocated_length:
            return
        lengths = [self.lengths[row] for row in rows]
        longest = max(lengths)
        device = self._positions_BC.device
        rows_N = torch.tensor(list(rows), device=device)
        seen_N1, length_N1 = (
            torch.tensor(list(numbers), device=device).unsqueeze(1) for numbers in (seen, lengths)
        )
        positions_NL = self._positions_BC[rows_N, :longest]
        is_used_NL = torch.arange(longest, device=device) < length_N1
        kept = ((positions_NL < seen_N1) & is_used_NL).sum(1).tolist()
        # Zero them: NaN or inf would survive multiplication by an attention weight of zero.
        tail = slice(min(kept), longest)
        kept_N1 = torch.tensor(kept, device=device).unsqueeze(1)
        dropped_NT = torch.arange(longest, device=device)[tail] >= kept_N1
        for field in self._fields:
            values = field[rows_N, tail]
            mask = dropped_NT.view(*dropped_NT.shape, *(1 for _ in values.shape[2:]))
            field[rows_N, tail] = values.masked_fill(mask, 0)
        for row, count in zip(rows, kept, strict=True):
            self.lengths[row] = count

    def allocated_bytes(self) -> int:
        """Allocated memory, unused entries included."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers())

    def is_all_rows(self, rows: Sequence[int]) -> bool:
        """Whether ``rows`` are all rows, in order."""
        return len(rows) == self.batch and all(row == i for i, row in enumerate(rows))

    def _buffers(self) -> tuple[Tensor, ...]:
        documents = () if self._documents_BC is None else (self._documents_BC,)
        return (*self._fields, self._positions_BC, *documents)

    def _reserve(
        self,
        rows: Sequence[int],
        counts: Sequence[int],
        fields: tuple[Tensor, ...],
        device: torch.device,
    ) -> None:
        """Reserve memory for ``counts`` more entries: drop those outside the window, else grow."""

        def missing() -> int:
            needed = (self.lengths[row] + n for row, n in zip(rows, counts, strict=True))
            return max(needed) - self.allocated_length

        if not self.allocated_length:
            length = _pages(missing())
            self._fields = tuple(_zeros(field, self.batch, length) for field in fields)
            self._positions_BC = torch.zeros(self.batch, length, dtype=torch.long, device=device)
        was_full = missing() > 0
        if was_full:
            self._drop_out_of_window()
        # A store that is still nearly full would be shifted again at each of the next tokens.
        length = self.allocated_length
        if was_full and missing() + max(length // _GROWTH, _PAGE // 2) > 0:
            self._move(length + _pages(max(missing(), length // _GROWTH)))

    def _drop_out_of_window(self) -> None:
        """Shift out the entries that no later token reads."""
        dropped = self._num_out_of_window()
        if not any(dropped):
            return
        device, length = self._positions_BC.device, self.allocated_length
        dropped_B1 = torch.tensor(dropped, device=device).unsqueeze(1)
        index_BC = torch.arange(length, device=device) + dropped_B1
        # The end of a row repeats its last entry, which is finite and behind the row's length.
        self._move(length, index_BC.clamp(max=length - 1))
        self.lengths = [length - n for length, n in zip(self.lengths, dropped, strict=True)]

    def _num_out_of_window(self) -> list[int]:
        """Number of oldest entries of each row that no later token reads."""
        if self.last is not None:
            kept = self.last + self.margin
            return [max(0, length - kept) for length in self.lengths]
        if self.window is None:
            return [0] * self.batch
        device = self._positions_BC.device
        length_B1 = torch.tensor(self.lengths, device=device).unsqueeze(1)
        is_used_BC = torch.arange(self.allocated_length, device=device) < length_B1
        newest_B1 = self._positions_BC.where(is_used_BC, -1).amax(1, keepdim=True)
        oldest_B1 = newest_B1 + 2 - self.window - self.margin
        counts: list[int] = ((self._positions_BC < oldest_B1) & is_used_BC).sum(1).tolist()
        return counts

    def _move(self, length: int, source_BC: Tensor | None = None) -> None:
        """Reallocate to ``length`` entries: copy the old ones, or those at ``source_BC``."""

        def move(old: Tensor) -> Tensor:
            new = _zeros(old, self.batch, length)
            if source_BC is None:
                new[:, : old.shape[1]] = old
            else:
                row_B1 = torch.arange(self.batch, device=old.device).unsqueeze(1)
                new.copy_(old[row_B1, source_BC])
            return new

        self._fields = tuple(map(move, self._fields))
        self._positions_BC = move(self._positions_BC)
        if self._documents_BC is not None:
            self._documents_BC = move(self._documents_BC)


def _heads_first(x: Tensor) -> Tensor:
    """Transpose (N, L, G, W) to (N, G, L, W), or back; other shapes are returned unchanged.

    The entries of a head are then contiguous, and attention reads them 1.5 times as fast.
    """
    return x.transpose(1, 2) if x.dim() == 4 else x


def _zeros(like: Tensor, batch: int, length: int) -> Tensor:
    """Zeros (B, C, …) of ``like``'s dtype and device, in the memory layout of `_heads_first`.

    Not uninitialised memory: an attention weight of zero times NaN is NaN.
    """
    shape = _heads_first(like[:1, :1].expand(batch, length, *like.shape[2:])).shape
    return _heads_first(like.new_zeros(shape))


def _pages(entries: int) -> int:
    """Round up to whole pages."""
    return max(1, -(-entries // _PAGE)) * _PAGE
