"""Ragged rows of entries, of which each may go on, be cut back and forget by itself.

Lengths are numbers on the host: what runs next depends on them.

Shapes: B rows of the store, N rows of a batch, C places, L entries in use, K new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A store grows by a 32nd and a page at least. Copying then costs as much as 32 of its entries a
# token, little beside attention, which reads all of them; and little is held that is not used.
_PAGE = 16
_GROWTH = 32


class Entries(NamedTuple):
    """Entries of some sequences, oldest first.

    fields: tensors (N, L, …). lengths: how many entries of each sequence count; what is behind them
    is finite and means nothing.
    """

    fields: tuple[Tensor, ...]
    lengths: list[int]


class Store:
    """Ragged rows of entries, one row a sequence, in the order of their positions.

    window: how many positions back the next token looks; None: all. last: how many entries back.
    margin: by how many tokens `truncate` may go back; so much more is kept of what the window or
    the last entries leave behind.
    """

    def __init__(
        self, batch: int, window: int | None = None, last: int | None = None, margin: int = 0
    ) -> None:
        self.batch, self.window, self.last, self.margin = batch, window, last, margin
        self.lengths = [0] * batch
        self._fields: tuple[Tensor, ...] = ()
        # Allocated on the device of the first entries; documents as soon as there are any.
        self._positions_BC = torch.zeros(batch, 0, dtype=torch.long)
        self._documents_BC: Tensor | None = None

    @property
    def places(self) -> int:
        """Entries of a row that there is memory for."""
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
        if is_full and self.is_all(rows) and min(starts) == max(starts):
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
        """Write new tokens (N, K, …) where each row goes on; None: all K of each count."""
        device, length = new[-1].device, new[-1].shape[1]
        row_N1 = torch.tensor(list(rows), device=device).unsqueeze(1)
        place_NK = torch.tensor(starts, device=device).unsqueeze(1)
        if length > 1:
            place_NK = place_NK + torch.arange(length, device=device)
        target = (row_N1.expand_as(place_NK), place_NK)
        if counts is not None:
            count_N1 = torch.tensor(list(counts), device=device).unsqueeze(1)
            is_own_NK = torch.arange(length, device=device) < count_N1
            target = (target[0][is_own_NK], place_NK[is_own_NK])
            new = [values[is_own_NK] for values in new]
        for buffer, values in zip(self._buffers(), new, strict=True):
            buffer.index_put_(target, values.to(buffer.dtype))

    def entries(self, rows: Sequence[int]) -> Entries:
        """Return what there is of these rows. Views where they are one row, or all."""
        return Entries(
            tuple(self._of(rows, field) for field in self._fields),
            [self.lengths[row] for row in rows],
        )

    def positions(self, rows: Sequence[int]) -> Tensor:
        """Where the token of each entry of these rows stands in the text (N, L)."""
        return self._of(rows, self._positions_BC)

    def documents(self, rows: Sequence[int]) -> Tensor:
        """The number of its document (N, L)."""
        if self._documents_BC is None:
            return torch.zeros_like(self.positions(rows))
        return self._of(rows, self._documents_BC)

    def _of(self, rows: Sequence[int], buffer: Tensor) -> Tensor:
        narrowed = buffer[:, : max([1, *(self.lengths[row] for row in rows)])]
        if len(rows) == 1:
            return narrowed[rows[0] : rows[0] + 1]
        if self.is_all(rows):
            return narrowed
        index_N = torch.tensor(list(rows), device=buffer.device)
        return _turned(_turned(narrowed).index_select(0, index_N))

    def truncate(self, rows: Sequence[int], seen: Sequence[int]) -> None:
        """Forget the entries of row ``rows[i]`` from position ``seen[i]`` on."""
        if not self.places:
            return
        kept = [self.lengths[row] for row in rows]
        longest = max(kept)
        device = self._positions_BC.device
        rows_N = torch.tensor(list(rows), device=device)
        seen_N1, length_N1 = (
            torch.tensor(list(numbers), device=device).unsqueeze(1) for numbers in (seen, kept)
        )
        positions_NL = self._positions_BC[rows_N, :longest]
        counts_NL = torch.arange(longest, device=device) < length_N1
        left = ((positions_NL < seen_N1) & counts_NL).sum(1).tolist()
        # Zeros: what is no number would stay none when a weight of zero multiplies it.
        tail = slice(min(left), longest)
        left_N1 = torch.tensor(left, device=device).unsqueeze(1)
        gone_NT = torch.arange(longest, device=device)[tail] >= left_N1
        for field in self._fields:
            own = field[rows_N, tail]
            mask = gone_NT.view(*gone_NT.shape, *(1 for _ in own.shape[2:]))
            field[rows_N, tail] = own.masked_fill(mask, 0)
        for row, count in zip(rows, left, strict=True):
            self.lengths[row] = count

    def allocated_bytes(self) -> int:
        """Memory held, the places not in use included."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers())

    def used_bytes(self) -> int:
        """Memory of the entries that there are."""
        return self.allocated_bytes() * sum(self.lengths) // max(1, self.batch * self.places)

    def is_all(self, rows: Sequence[int]) -> bool:
        """Whether ``rows`` are all of them, and in order."""
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
        """Make room for so many more entries: drop what nobody will look at, else grow."""

        def missing() -> int:
            wanted = (self.lengths[row] + n for row, n in zip(rows, counts, strict=True))
            return max(wanted) - self.places

        if not self.places:
            places = _pages(missing())
            self._fields = tuple(_zeros(field, self.batch, places) for field in fields)
            self._positions_BC = torch.zeros(self.batch, places, dtype=torch.long, device=device)
        was_full = missing() > 0
        if was_full:
            self._drop_unseen()
        # A store that is nearly full would be shifted again at each of the next tokens.
        if was_full and missing() + max(self.places // _GROWTH, _PAGE // 2) > 0:
            # Zeros, not whatever lay there: a weight of zero times NaN is NaN.
            self._move(self.places + _pages(max(missing(), self.places // _GROWTH)))

    def _drop_unseen(self) -> None:
        """Shift out the entries that are behind every coming token's window."""
        gone = self._unseen()
        if not any(gone):
            return
        device = self._positions_BC.device
        gone_B1 = torch.tensor(gone, device=device).unsqueeze(1)
        place_BC = torch.arange(self.places, device=device) + gone_B1
        # The rows' ends now repeat the last place, which is finite and behind the length.
        self._move(self.places, place_BC.clamp(max=self.places - 1))
        self.lengths = [length - n for length, n in zip(self.lengths, gone, strict=True)]

    def _unseen(self) -> list[int]:
        """How many of the oldest entries of each row no coming token looks at."""
        if self.last is not None:
            kept = self.last + self.margin
            return [max(0, length - kept) for length in self.lengths]
        if self.window is None:
            return [0] * self.batch
        device = self._positions_BC.device
        length_B1 = torch.tensor(self.lengths, device=device).unsqueeze(1)
        counts_BC = torch.arange(self.places, device=device) < length_B1
        newest_B1 = self._positions_BC.where(counts_BC, -1).amax(1, keepdim=True)
        oldest_B1 = newest_B1 + 2 - self.window - self.margin
        gone: list[int] = ((self._positions_BC < oldest_B1) & counts_BC).sum(1).tolist()
        return gone

    def _move(self, places: int, source_BC: Tensor | None = None) -> None:
        """Take new memory of ``places`` places: the old ones, or those of ``source_BC``."""

        def move(old: Tensor) -> Tensor:
            new = _zeros(old, self.batch, places)
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


def _turned(x: Tensor) -> Tensor:
    """Turn (N, L, G, W) into (N, G, L, W), or back; others stay as they are.

    So entries of a head lie in a row in memory, which attention reads half as fast again.
    """
    return x.transpose(1, 2) if x.dim() == 4 else x


def _zeros(like: Tensor, batch: int, places: int) -> Tensor:
    """Zeros (B, C, …) of the kind of ``like``, in the order in memory of `_turned`."""
    shape = _turned(like[:1, :1].expand(batch, places, *like.shape[2:])).shape
    return _turned(like.new_zeros(shape))


def _pages(entries: int) -> int:
    """Round up to whole pages."""
    return max(1, -(-entries // _PAGE)) * _PAGE
