"""Files that are whole or absent: written under a temporary name, flushed to disk, renamed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from modtrain.common.errors import CheckpointError

# Seconds between two tries at a lock that another process holds.
_POLL_SECONDS = 0.05


class NoLocksError(CheckpointError):
    """A directory on a file system that has no locks."""


@contextmanager
def atomic_writer(path: Path, temporary_dir: Path) -> Iterator[BinaryIO]:
    """Open a file in ``temporary_dir`` that is renamed to ``path`` when the block succeeds.

    Both must be on one file system. After an error or an interrupt nothing is left; after a kill,
    the file in ``temporary_dir``.
    """
    # The process id distinguishes two workers that write the same file after a restart.
    temporary = temporary_dir / f".{path.name}.{os.getpid()}"
    try:
        with temporary.open("wb") as file, name_file(path):
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def name_file(path: Path) -> Iterator[None]:
    """Let an error of writing name ``path``, as one of opening does."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_bytes(path: Path, content: bytes, temporary_dir: Path) -> None:
    """Write ``content`` to ``path`` atomically, through a file in ``temporary_dir``."""
    with atomic_writer(path, temporary_dir) as file:
        file.write(content)


def write_json(path: Path, content: Any, temporary_dir: Path) -> None:
    """Write ``content`` as canonical JSON to ``path`` atomically."""
    write_bytes(path, canonical_json(content) + b"\n", temporary_dir)


def canonical_json(content: Any) -> bytes:
    """Return ``content`` as JSON, equal content as equal bytes."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def without_nan(content: Any) -> Any:
    """Return ``content`` with None for each number that is not finite, for which JSON has none."""
    if isinstance(content, Mapping):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def digest(content: Any) -> str:
    """Hexadecimal SHA-256 of ``content`` as JSON."""
    return hashlib.sha256(canonical_json(content)).hexdigest()


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, through a hidden file beside it."""
    write_bytes(path, text.encode(), path.parent)


def sync(path: Path) -> None:
    """Make a file's content, or the renames inside a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_to_append(path: Path) -> BinaryIO:
    """Open a file to append to; it is made if it is missing.

    Raises:
        CheckpointError: it is no regular file: a link could lead anywhere, and a pipe blocks.
    """
    return _open_own(path, os.O_WRONLY | os.O_APPEND)


def _open_own(path: Path, flags: int, create: bool = True) -> BinaryIO:
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        descriptor = os.open(path, flags, 0o666)
        is_regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError as error:
        # A link, and a pipe that nobody reads.
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        is_regular = False
    else:
        if not is_regular:
            os.close(descriptor)
    if not is_regular:
        raise CheckpointError(
            f"{path} is not a regular file, and is not written\nremedy: remove it, or rename it"
        )
    return os.fdopen(descriptor, "ab" if flags & os.O_APPEND else "rb")


@contextmanager
def acquire_lock(
    path: Path,
    in_use: Exception | None = None,
    timeout: float = 0.0,
    *,
    is_shared: bool = False,
) -> Iterator[None]:
    """Hold the lock ``path`` against other processes, till the block or this process ends.

    in_use: what to raise where another process holds it; None: BlockingIOError.
    timeout: seconds for which it may hold it. is_shared: several may hold it that share it.

    Raises:
        NoLocksError: the file system has no locks.
    """
    with _open_own(path, os.O_RDWR) as file:
        deadline = time.monotonic() + timeout
        while True:
            try:
                kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise (in_use or error) from None
            except OSError as error:
                raise NoLocksError(
                    f"{path} cannot be locked: {error}. runs_dir has to be on a file system with"
                    " flock (Lustre: mount with -o flock, or localflock)"
                ) from None
            time.sleep(_POLL_SECONDS)
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock ``path``; one on another node may not show.

    Where locks do not work there is none: a process that tries to acquire it gets the error.
    """
    try:
        with _open_own(path, os.O_RDONLY, create=False) as file:
            # Shared and for an instant: those who look do not see one another.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except (OSError, CheckpointError):
        return False
