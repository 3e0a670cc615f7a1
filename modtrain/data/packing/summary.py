"""What the index of a prepared directory says of its packing. Imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

BEST_FIT = "best_fit"


@dataclass(frozen=True)
class SplitPacking:
    """How the documents of a split are packed.

    num_padding: places of the stored sequences that hold no token. num_cut: documents that are
    longer than a stored sequence, and stand in several. num_cut_if_concatenated: documents that
    would stand in several if all were laid end to end.
    """

    num_padding: int
    num_cut: int
    num_cut_if_concatenated: int

    def __add__(self, other: SplitPacking) -> SplitPacking:
        """Return the sums of both."""
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(SplitPacking)]
        return SplitPacking(*(a + b for a, b in pairs))


Packing = Mapping[str, SplitPacking]
"""By split. Data whose documents are laid end to end have none, and no padding."""


def packing_text(
    num_sequences: int, seq_len: int, num_documents: int, packing: SplitPacking
) -> str:
    """Describe the packing of a split for people."""
    share = padding_share(num_sequences, seq_len, packing)
    return (
        f"{share:.2%} of the places are padding; {packing.num_cut:,} of {num_documents:,} documents"
        f" are cut, laid end to end it would be {packing.num_cut_if_concatenated:,}"
    )


def padding_share(num_sequences: int, seq_len: int, packing: SplitPacking | None) -> float:
    """Return the share of the places, ``seq_len`` a sequence, that train nothing.

    A place trains nothing if the token after it is padding: as many as there are padding.
    """
    places = num_sequences * seq_len
    return 0.0 if packing is None else packing.num_padding / max(1, places)
