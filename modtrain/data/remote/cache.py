"""Whole shards and side files on the node's disk, shared by its processes and by runs.

A file is named by its SHA-256, and is renamed to that once its content has it: what is
there is whole, and is the right one. One process fetches a file while the others wait. What cannot
be kept (the disk is full, the directory is gone) costs time and no data.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from modtrain.data.remote.files import ChangedError

log = logging.getLogger(__name__)
_SUFFIX = ".tar"
# Of a download that a kill left behind, in seconds.
_STALE = 3600.0
# Seconds without another try after the disk was full or not there.
_PAUSE = 60.0
# Seconds until the directory, in which there may be 100,000 files, is read again.
_RECOUNT = 10.0
# Left free on the disk, for others.
_SPARE_BYTES = 1 << 28
# The share of what is free and in the cache that the cache takes unless told.
_DEFAULT_SHARE = 0.5


class RemoteFile(Protocol):
    """A shard or a side file, as the index has it."""

    @property
    def num_bytes(self) -> int:
        """Its size."""
        ...

    @property
    def sha256(self) -> str:
        """Its checksum, in hexadecimal digits."""
        ...


def default_directory() -> Path:
    """Return the cache in the node's scratch: below ``SLURM_TMPDIR``, or where TMPDIR says."""
    scratch = os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()
    return Path(scratch, f"modtrain-shards-{os.getuid()}")


class ShardCache:
    """Whole shards in a directory of at most ``max_bytes``.

    What other processes fetch is counted some seconds later: the bound holds to that.
    """

    def __init__(self, directory: str | Path | None, max_bytes: float | None) -> None:
        """directory: None: `default_directory`. max_bytes: None: half of what the disk has."""
        self.directory = Path(directory) if directory else default_directory()
        self._max_bytes = max_bytes
        self._paused_until = 0.0
        self._has_warned = False
        self._sizes: dict[str, int] = {}
        self._counted_at = -_RECOUNT

    @property
    def max_bytes(self) -> float:
        """The bound; 0 where there is no such disk."""
        if self._max_bytes is None:
            self._max_bytes = _DEFAULT_SHARE * (self._free_bytes() + sum(self.sizes().values()))
        return self._max_bytes

    @property
    def is_paused(self) -> bool:
        """Whether the disk could not take a shard a moment ago."""
        return time.monotonic() < self._paused_until

    def has(self, shard: RemoteFile) -> bool:
        """Whether a shard is there."""
        try:
            return self._path(shard).lstat().st_uid == os.getuid()
        except OSError:
            return False

    def read(self, shard: RemoteFile, ranges: Iterable[tuple[int, int]]) -> list[bytes] | None:
        """Return the bytes (start, stop) of a shard; None where it is not there, or not whole."""
        path = self._path(shard)
        try:
            # It may be evicted meanwhile: an open file stays.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            status = os.fstat(descriptor)
            if status.st_uid != os.getuid():
                # Somebody else's, in a directory that all may write to.
                return None
            if status.st_size != shard.num_bytes:
                raise OSError
            return [os.pread(descriptor, stop - start, start) for start, stop in ranges]
        except OSError:
            _remove_damaged(path)
            return None
        finally:
            os.close(descriptor)

    def path(self, file: RemoteFile) -> Path | None:
        """Where a whole file lies, to be opened at once; None where it is not there, or damaged."""
        path = self._path(file)
        try:
            status = path.lstat()
        except OSError:
            return None
        if status.st_uid != os.getuid():
            return None
        if status.st_size != file.num_bytes:
            _remove_damaged(path)
            return None
        return path

    def sizes(self) -> dict[str, int]:
        """Bytes of each shard that is there, by SHA-256; those fetched first come first."""
        if time.monotonic() - self._counted_at > _RECOUNT:
            self._sizes = self._count()
            self._counted_at = time.monotonic()
        return dict(self._sizes)

    def _count(self) -> dict[str, int]:
        aged_sizes = []
        with suppress(OSError), os.scandir(self.directory) as entries:
            for entry in entries:
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if entry.name.endswith(_SUFFIX):
                        name = entry.name.removesuffix(_SUFFIX)
                        aged_sizes.append((status.st_mtime_ns, name, status.st_size))
                    elif entry.name.startswith(".") and time.time() - status.st_mtime > _STALE:
                        Path(entry.path).unlink()
        return {name: size for _, name, size in sorted(aged_sizes)}

    def evict(self, sha256: str) -> None:
        """Remove a shard; who reads it at this moment goes on."""
        (self.directory / f"{sha256}{_SUFFIX}").unlink(missing_ok=True)
        self._sizes.pop(sha256, None)

    def fetch(
        self,
        shard: RemoteFile,
        chunks: Callable[[], Iterator[bytes]],
        *,
        location: str,
        make_room: Callable[[int], bool] | None = None,
    ) -> bool:
        """Fetch a shard, or wait for the process that does; return whether it is there then.

        chunks: its content from the server, in order; called again where the content was damaged.
        location: of the shard, for a message. make_room: makes a number of bytes free, and returns
        whether there are; None: nothing is evicted.

        Raises ChangedError where its content has not the checksum, twice; DataError where it does
        not come.
        """
        if self.has(shard):
            return True
        if self.is_paused or shard.num_bytes > self.max_bytes:
            return False
        try:
            self.make_directory()
            with FileLock(self.directory / f"{shard.sha256}.lock"):
                return self.has(shard) or self._fetch(shard, chunks, location, make_room)
        except (OSError, Timeout) as error:
            self._pause(f"cannot be used ({error})")
            return False
        finally:
            # A process that has it open, and waits, locks what is no longer there: the shard may
            # then be fetched twice, which is no harm.
            with suppress(OSError):
                (self.directory / f"{shard.sha256}.lock").unlink()

    def _fetch(
        self,
        shard: RemoteFile,
        chunks: Callable[[], Iterator[bytes]],
        location: str,
        make_room: Callable[[int], bool] | None,
    ) -> bool:
        there = sum(self.sizes().values())
        missing = int(there + shard.num_bytes - self.max_bytes)
        if missing > 0 and not (make_room is not None and make_room(missing)):
            return False
        if self._free_bytes() < shard.num_bytes + min(_SPARE_BYTES, self.max_bytes / 10):
            self._pause("is on a disk that is full")
            return False
        for _ in range(2):
            temporary = self.directory / f".{shard.sha256}.{os.getpid()}-{threading.get_ident()}"
            try:
                if _write(temporary, chunks()) == shard.sha256:
                    temporary.replace(self._path(shard))
                    self._sizes[shard.sha256] = shard.num_bytes
                    return True
            finally:
                temporary.unlink(missing_ok=True)
            log.warning("%s: came with another checksum than the index has: once more", location)
        raise ChangedError(
            f"{location}: has not the checksum that the index has. It is damaged, or was changed on"
            " the server: copy the prepared directory there again."
        )

    def make_directory(self) -> None:
        """Make the directory if it is missing; raise OSError where that fails."""
        folder = self.directory
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Others may write to the scratch directory as well.
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise OSError(f"{folder} belongs to somebody else")

    def _free_bytes(self) -> int:
        folder = self.directory
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def _pause(self, reason: str) -> None:
        self._paused_until = time.monotonic() + _PAUSE
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "data.cache_dir=%s %s: shards are read from the server without it, and it is tried"
                " again each minute",
                self.directory,
                reason,
            )

    def _path(self, shard: RemoteFile) -> Path:
        return self.directory / f"{shard.sha256}{_SUFFIX}"


def _remove_damaged(path: Path) -> None:
    log.warning("%s: is damaged, and is fetched again", path)
    path.unlink(missing_ok=True)


def _write(path: Path, chunks: Iterator[bytes]) -> str:
    """Write a file, flushed to the disk; return its SHA-256."""
    checksum = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in chunks:
            checksum.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return checksum.hexdigest()
