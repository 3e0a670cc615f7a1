"""From a stream of tokens to tar shards of packed sequences, in the WebDataset format.

Sequence i of T = seq_len holds the tokens [i·T, i·T + T] of the stream: T inputs, and the T targets
that are the inputs moved on by one. A tar sample holds many sequences: one array (n, T + 1).
"""

from __future__ import annotations

import io
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modtrain.common.atomic_io import atomic_writer, digest, file_sha256, write_json
from modtrain.common.reading import UnreadableError, read_json
from modtrain.data.stream.prepared import ITEM_SIZES, Shard

_OWNER = "modtrain"


@dataclass(frozen=True)
class TokenFile:
    """Tokens on disk, little-endian and nothing else.

    key: stands for the content; equal keys, equal tokens.
    """

    path: str
    num_tokens: int
    key: str


@dataclass(frozen=True)
class PackLayout:
    """How sequences are laid out in shards; the fields of PrepareConfig by these names."""

    seq_len: int
    sequences_per_sample: int
    samples_per_shard: int
    dtype: str

    @property
    def sequences_per_shard(self) -> int:
        """Sequences in every shard but the last of a split."""
        return self.sequences_per_sample * self.samples_per_shard

    def num_sequences(self, num_tokens: int) -> int:
        """Sequences that a stream gives; the last token of each is the first of the next."""
        return max(0, (num_tokens - 1) // self.seq_len)

    def dropped_tokens(self, num_tokens: int) -> int:
        """Tokens of the stream's end that fill no sequence."""
        num_sequences = self.num_sequences(num_tokens)
        return num_tokens - (num_sequences * self.seq_len + 1) if num_sequences else num_tokens


@dataclass(frozen=True)
class ShardJob(ABC):
    """One shard to write.

    first_sequence: number of the shard's first sequence in its split.
    work: the working directory, with ``shards/`` and ``staging/``.
    """

    path: str
    work: str
    layout: PackLayout
    first_sequence: int

    @property
    @abstractmethod
    def key(self) -> str:
        """Differs wherever the content of the shard might."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Of the tokens that the shard is made of, for progress."""

    @abstractmethod
    def sequences(self) -> NDArray[Any]:
        """Return the shard's sequences (N, T + 1)."""

    @property
    def record_file(self) -> Path:
        """Where the shard's record is written, once the shard is."""
        path = Path(self.path)
        return Path(self.work) / "shards" / f"{path.parent.name}-{path.name}.json"


@dataclass(frozen=True)
class ConcatenateJob(ShardJob):
    """A shard of documents that are laid end to end.

    pieces: (token file, first token, number of tokens), together the tokens of the shard.
    """

    pieces: tuple[tuple[TokenFile, int, int], ...]

    @property
    def key(self) -> str:
        """Differs wherever the content of the shard might."""
        pieces = [[file.key, start, count] for file, start, count in self.pieces]
        return digest([asdict(self.layout), self.first_sequence, pieces])

    @property
    def num_bytes(self) -> int:
        """Of the tokens that the shard is made of, for progress."""
        return ITEM_SIZES[self.layout.dtype] * sum(count for _, _, count in self.pieces)

    def sequences(self) -> NDArray[Any]:
        """Return the shard's sequences (N, T + 1), each sharing one token with the next."""
        dtype = np.dtype(self.layout.dtype).newbyteorder("<")
        item_size = ITEM_SIZES[self.layout.dtype]
        tokens = np.concatenate(
            [
                np.fromfile(file.path, dtype, count, offset=start * item_size)
                for file, start, count in self.pieces
            ]
        )
        seq_len = self.layout.seq_len
        return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]


def plan_shards(
    files: Sequence[TokenFile], layout: PackLayout, directory: Path, work: Path
) -> list[ShardJob]:
    """Jobs that write the stream ``files`` to ``directory/shard-000000.tar`` and so on."""
    ends = np.cumsum([0, *(file.num_tokens for file in files)])
    total = layout.num_sequences(int(ends[-1]))
    jobs: list[ShardJob] = []
    for number, first in enumerate(range(0, total, layout.sequences_per_shard)):
        last = min(first + layout.sequences_per_shard, total)
        pieces = _pieces(files, ends, first * layout.seq_len, last * layout.seq_len + 1)
        path = directory / f"shard-{number:06d}.tar"
        jobs.append(ConcatenateJob(str(path), str(work), layout, first, pieces))
    return jobs


def _pieces(
    files: Sequence[TokenFile], ends: NDArray[np.int64], start: int, end: int
) -> tuple[tuple[TokenFile, int, int], ...]:
    """The parts of the files that make up the tokens [start, end) of the stream."""
    first = int(np.searchsorted(ends, start, side="right")) - 1
    pieces = []
    while first < len(files) and ends[first] < end:
        begin = max(start, int(ends[first]))
        stop = min(end, int(ends[first + 1]))
        if stop > begin:
            pieces.append((files[first], begin - int(ends[first]), stop - begin))
        first += 1
    return tuple(pieces)


def finished_shard(job: ShardJob) -> Shard | None:
    """The record of a shard that an earlier run finished, None if it has to be written."""
    path = Path(job.path)
    if not job.record_file.exists() or not path.exists():
        return None
    try:
        record = read_json(job.record_file)
        if record["key"] != job.key or path.stat().st_size != record["num_bytes"]:
            return None
        members = tuple((offset, count) for offset, count in record["members"])
        return Shard(path.name, record["num_bytes"], record["sha256"], members)
    except (UnreadableError, KeyError, TypeError, ValueError):
        # Damaged: the shard is written again.
        return None


def write_shard(job: ShardJob) -> Shard:
    """Write one shard and then its record. Equal jobs give equal bytes."""
    # Importing webdataset takes a second, as it imports torch.
    from webdataset.writer import TarWriter  # noqa: PLC0415

    sequences_NT = job.sequences()
    staging = Path(job.work) / "staging"
    path = Path(job.path)
    counts = []
    with atomic_writer(path, staging) as file:
        with TarWriter(file, user=_OWNER, group=_OWNER, mtime=0, encoder=False) as tar:
            for start in range(0, len(sequences_NT), job.layout.sequences_per_sample):
                part_NT = sequences_NT[start : start + job.layout.sequences_per_sample]
                key, buffer = f"{job.first_sequence + start:012d}", io.BytesIO()
                np.save(buffer, np.ascontiguousarray(part_NT), allow_pickle=False)
                tar.write({"__key__": key, "tokens.npy": buffer.getvalue()})
                counts.append(len(part_NT))
        file.flush()
    with tarfile.open(path, "r:") as tar:
        offsets = [member.offset_data for member in tar]
    members = tuple(zip(offsets, counts, strict=True))
    shard = Shard(path.name, path.stat().st_size, file_sha256(path), members)
    write_json(job.record_file, {**asdict(shard), "key": job.key}, staging)
    return shard
