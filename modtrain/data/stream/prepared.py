"""What a prepared directory holds: the names of its files, and what its index says of them.

Imports neither torch nor numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

from modtrain.data.packing.summary import Packing, packing_text, padding_share

INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.json"
SPLITS = ("train", "valid")
DOCUMENTS_NAME = "documents.npy"
SOURCE_FILES_NAME = "source_files.json"
SIDE_FILES = (*(f"{split}/{DOCUMENTS_NAME}" for split in SPLITS), SOURCE_FILES_NAME)
"""What is told of the documents beside the shards; training reads none of it."""
ROWS_NAME = "rows.npy"
PIECES_NAME = "pieces.npy"
PACKING_FILES = tuple(f"{split}/{name}" for split in SPLITS for name in (ROWS_NAME, PIECES_NAME))
"""What is told of the sequences where the documents were packed; training reads the rows."""
# Of a numpy array on disk, little-endian.
ITEM_SIZES = {"uint16": 2, "uint32": 4}
DAMAGED = (
    "Copy the prepared directory again, or remove it and run modtrain prepare with its sources."
)


@dataclass(frozen=True)
class SplitSummary:
    """Counts of one split.

    num_sequences: stored sequences, each of seq_len + 1 tokens, the last of them the first of the
        next sequence; where documents are packed, no token is in two, and padding may follow.
    num_tokens: tokens of all documents with their end tokens, the dropped tail included.
    num_bytes: UTF-8 bytes of the documents' text; num_bytes / num_tokens turns a loss a token
        into bits a byte.
    dropped_tokens: tokens of the incomplete last sequence, which is not stored.
    """

    num_sequences: int
    num_tokens: int
    num_documents: int
    num_bytes: int
    dropped_tokens: int


@dataclass(frozen=True)
class IndexSummary:
    """What training must know of a prepared directory, without its list of shards.

    flaws: kind of damage found in the corpus → how many documents or files were left out for it.
    fingerprint: SHA-256 over the shards' checksums, the tokenizer's and seq_len.
    end_token: the text of ``eos_id``, where it is not the first with a usual name.
    packing: of the documents, where they are packed by best fit; None: they are laid end to end.
    """

    seq_len: int
    vocab_size: int
    eos_id: int
    dtype: str
    tokenizer_sha256: str
    fingerprint: str
    num_files: int
    flaws: dict[str, int]
    splits: dict[str, SplitSummary]
    end_token: str | None = None
    packing: Packing | None = None

    @property
    def padding_id(self) -> int:
        """What is stored in the place of a token where there is none, behind the vocabulary."""
        return self.vocab_size

    def padding_share(self, split: str) -> float:
        """Return the share of a split's places that train nothing; see `padding_share`."""
        own = None if self.packing is None else self.packing[split]
        return padding_share(self.splits[split].num_sequences, self.seq_len, own)

    def packing_lines(self, source: str = "") -> list[str]:
        """Describe for people the splits whose documents are packed by best fit.

        source: the data's name in a mixture.
        """
        lines = []
        for name, packing in (self.packing or {}).items():
            split = self.splits[name]
            counts = (split.num_sequences, self.seq_len, split.num_documents)
            where = f"{source}, {name}" if source else name
            lines.append(f"{where}: {packing_text(*counts, packing)}")
        return lines

    def num_samples(self, seq_len: int) -> int:
        """Return the training samples of ``seq_len`` tokens that an epoch has."""
        return self.splits["train"].num_sequences * (self.seq_len // seq_len)


@dataclass(frozen=True)
class Shard:
    """One tar file.

    members: (offset of an .npy file inside the tar, in bytes; sequences in it), in order. All of
        a split hold equally many, but the last one may hold fewer.
    """

    name: str
    num_bytes: int
    sha256: str
    members: tuple[tuple[int, int], ...]

    @property
    def num_sequences(self) -> int:
        """Sequences in all the members."""
        return sum(count for _, count in self.members)


@dataclass(frozen=True)
class SideFile:
    """One of `SIDE_FILES` or `PACKING_FILES`."""

    num_bytes: int
    sha256: str
