"""A prepared directory: its index, and its files checked against it.

The index is the only mark of completeness: it is written last. Imports neither torch nor numpy, so
that a configuration can be checked against the data in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from modtrain.common.atomic_io import file_sha256
from modtrain.common.errors import DataError
from modtrain.data.remote.fetched import fetched_checked
from modtrain.data.remote.urls import is_url
from modtrain.data.stream.index_json import read_index, read_summary
from modtrain.data.stream.prepared import (
    DAMAGED,
    INDEX_NAME,
    TOKENIZER_NAME,
    IndexSummary,
    Shard,
    SideFile,
)

_MAX_TOKENIZER_BYTES = 1 << 28


@dataclass(frozen=True)
class ShardIndex:
    """A prepared directory: its summary and every shard.

    location: its path, or its URL.
    """

    location: str
    summary: IndexSummary
    shards: dict[str, tuple[Shard, ...]]
    side_files: dict[str, SideFile] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path, verify: str = "size") -> ShardIndex:
        """Read and check the index of the prepared directory ``path``.

        verify: ``size`` compares the size of each shard, ``sha256`` its content too, ``none``
            trusts the directory. Behind a URL no shard is looked at yet.
        Raises DataError that names the file and the remedy.
        """
        index = cls(str(path), *read_index(path))
        if verify != "none":
            if not index.is_remote:
                index._check_shards(with_checksums=verify == "sha256")
                if verify == "sha256":
                    index._check_side_files()
            index._check_vocabulary(checked_tokenizer(path, index.summary.tokenizer_sha256))
        return index

    @property
    def is_remote(self) -> bool:
        """Whether the directory is behind a URL."""
        return is_url(self.location)

    def shard_path(self, split: str, shard: Shard) -> Path:
        """Where a shard of a local directory lies."""
        return Path(self.location, split, shard.name)

    def shard_location(self, split: str, shard: Shard) -> str:
        """The path or the URL of a shard, for a message."""
        return f"{self.location.rstrip('/')}/{split}/{shard.name}"

    def _check_shards(self, *, with_checksums: bool) -> None:
        for split, shards in self.shards.items():
            for shard in shards:
                _check_shard(self.shard_path(split, shard), shard, with_checksums=with_checksums)

    def side_file(self, name: str) -> Path:
        """Where a side file lies; one behind a URL is fetched, and raises DataError."""
        if not self.is_remote:
            return Path(self.location, name)
        side = self.side_files[name]
        return fetched_checked(self.location, name, side.num_bytes, side.sha256)

    def _check_side_files(self) -> None:
        for name, expected in self.side_files.items():
            path = Path(self.location, name)
            if not path.is_file() or file_sha256(path) != expected.sha256:
                raise DataError(f"{path}: is not that of the index. {DAMAGED}")

    def _check_vocabulary(self, tokenizer: Path) -> None:
        """Compare with the tokenizer: the fingerprint covers it, and not what the index says."""
        # The library takes a moment to import: by those alone who read shards.
        from modtrain.data.prepare.tokenizer import check_tokenizer, end_id_of  # noqa: PLC0415

        content, name = tokenizer.read_bytes(), str(tokenizer)
        end_id = end_id_of(content, name, self.summary.end_token)
        there = check_tokenizer(content, name, end_id)
        for key, actual in zip(("vocab_size", "eos_id"), there, strict=True):
            if (recorded := getattr(self.summary, key)) != actual:
                raise DataError(
                    f"{self.location}/{INDEX_NAME}: {key} is {recorded}; its tokenizer has"
                    f" {actual}. {DAMAGED}"
                )


def tokenizer_file(path: str | Path) -> Path:
    """Return the tokenizer of the prepared directory ``path``; one behind a URL is fetched.

    Raises DataError where it does not come, or is another one than the index says.
    """
    if not is_url(path):
        return Path(path, TOKENIZER_NAME)
    return checked_tokenizer(path, read_summary(path).tokenizer_sha256)


def checked_tokenizer(path: str | Path, sha256: str) -> Path:
    """The same for a checksum that is known; a local file is compared with it as well."""
    if is_url(path):
        return fetched_checked(str(path), TOKENIZER_NAME, _MAX_TOKENIZER_BYTES, sha256)
    tokenizer = Path(path, TOKENIZER_NAME)
    if not tokenizer.is_file():
        raise DataError(f"{tokenizer}: missing. {DAMAGED}")
    if file_sha256(tokenizer) != sha256:
        raise DataError(f"{tokenizer}: is not the tokenizer of these shards. {DAMAGED}")
    return tokenizer


def _check_shard(path: Path, shard: Shard, *, with_checksums: bool) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). {DAMAGED}") from error
    if size != shard.num_bytes:
        raise DataError(f"{path}: has {size} bytes, not {shard.num_bytes}. {DAMAGED}")
    if with_checksums and file_sha256(path) != shard.sha256:
        raise DataError(f"{path}: its SHA-256 is not that of the index. {DAMAGED}")
