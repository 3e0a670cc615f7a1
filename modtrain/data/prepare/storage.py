"""Where the files of a corpus lie: on disk, behind an address, or what a command prints."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from modtrain.common.errors import DataError
from modtrain.data.remote.urls import driver_fault, is_url, without_secrets

PIPE_PREFIX = "pipe:"
_HTTP = re.compile(r"https?://", re.I)
_BLOCK_BYTES = 1 << 22
_TRIES = 3
# Seconds in which a web server has to send something.
_STALL_SECONDS = 120.0
# Seconds before the second try; the next wait is twice as long.
_WAIT_SECONDS = 0.5
# What stores say of a file's version, the first that is there.
_VERSIONS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "oid", "created")


class MissingError(DataError):
    """An address at which there is no file."""


def is_command(path: str) -> bool:
    """Whether ``path`` is a command of the user's, whose output is read."""
    return path.startswith(PIPE_PREFIX)


def has_ranges(path: str) -> bool:
    """Whether a part of a file can be read without what comes before it."""
    return not is_command(path) and _HTTP.match(path) is None


def file_name(path: str) -> str:
    """Return the name of a file without its folders; a command is its own."""
    if is_command(path):
        return path
    return Path(urlsplit(path).path if is_url(path) else path).name


def shown_name(path: str) -> str:
    """Return a path or address without what may be secret: a signature, a user and a password."""
    return without_secrets(path) if is_url(path) else path


def status_of(path: str) -> tuple[int, int]:
    """Return the size of a file in bytes, and a number that changes with its content.

    That is the time of its last change in ns, or a hash of the version that a store tells.
    """
    if not is_url(path):
        status = Path(path).stat()
        return status.st_size, status.st_mtime_ns
    files, inner = _file_system(path)
    files.invalidate_cache()
    info = _asked(path, lambda: files.info(inner))
    size = info.get("size")
    if size is None:
        raise DataError(
            f"{shown_name(path)}: the server does not tell its size. Fetch it, and name the file."
        )
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return int(size), int(hashlib.sha256(version.encode()).hexdigest()[:15], 16)


def remote_matches(source: str) -> list[str]:
    """Return the addresses that a source names, sorted: ``{000..007}`` and globs are expanded."""
    # Needed for addresses alone.
    from braceexpand import braceexpand  # noqa: PLC0415

    urls: list[str] = []
    for url in braceexpand(source) if "{" in source else [source]:
        # In an address of the web a question mark begins a query.
        pattern = url.partition("?")[0] if _HTTP.match(url) else url
        files, inner = _file_system(url)
        if not any(character in pattern for character in "*?["):
            urls.append(url)
            continue
        paths = _asked(url, partial(files.glob, inner, detail=True))
        names = sorted(name for name, info in paths.items() if info["type"] == "file")
        urls += [files.unstrip_protocol(name) for name in names]
    return urls


@contextmanager
def open_source(path: str) -> Iterator[BinaryIO]:
    """Open a file to read it from its beginning to its end, or run the command after ``pipe:``.

    A local file can be read from anywhere.
    Raises DataError where the command fails, or a server does not give the file.
    """
    if is_command(path):
        with _command(path) as printed:
            yield printed
    elif is_url(path):
        with _RemoteFile(path) as file, io.BufferedReader(file, _BLOCK_BYTES) as buffered:
            yield buffered
    else:
        with Path(path).open("rb") as local:
            yield local


@contextmanager
def open_anywhere(path: str) -> Iterator[BinaryIO]:
    """Open a file to read any parts of it; what a web server gives is copied to disk first."""
    if is_url(path) and has_ranges(path):
        with open_source(path) as file:
            yield file
    else:
        with local_copy(path) as local, local.open("rb") as file:
            yield file


@contextmanager
def local_copy(path: str) -> Iterator[Path]:
    """Yield a path on this machine's disk with the content of a file, for as long as needed.

    A copy lies in the folder for temporary files (``TMPDIR``), and takes as much as the file.
    """
    if not is_url(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="modtrain-") as folder:
        copy = Path(folder) / "copy"
        with open_source(path) as source, copy.open("wb") as file:
            shutil.copyfileobj(source, file, _BLOCK_BYTES)
        yield copy


def _file_system(url: str) -> tuple[Any, str]:
    # It imports the drivers that are there.
    from fsspec.core import url_to_fs  # noqa: PLC0415

    if fault := driver_fault(url):
        raise DataError(f"{shown_name(url)}: {fault[0]}: {fault[1]}")
    try:
        files, inner = url_to_fs(url, **(_http_options() if _HTTP.match(url) else {}))
    except Exception as error:  # drivers raise what they like, as of credentials
        raise DataError(without_secrets(f"{url}: {error}")) from error
    return files, inner


def _http_options() -> dict[str, Any]:
    import aiohttp  # noqa: PLC0415

    # Text is encoded while its file is read, which takes more than the five minutes of the default.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=_STALL_SECONDS)
    # Sizes are those of the files, whatever a server would rather send.
    headers = {"Accept-Encoding": "identity"}
    return {"client_kwargs": {"timeout": timeout}, "headers": headers}


def _asked(url: str, question: Callable[[], Any]) -> Any:
    """Return what a store answers; drivers raise what they like."""
    try:
        return question()
    except FileNotFoundError:
        raise MissingError(f"{shown_name(url)}: is not there.") from None
    except Exception as error:
        reason = without_secrets(str(error) or type(error).__name__)
        raise DataError(
            f"{shown_name(url)}: {reason}. Credentials are those that its driver finds, as in the"
            " environment."
        ) from error


class _RemoteFile(io.RawIOBase):
    """A file behind an address: whole, or an error; read again from where it broke off."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._files, self._inner = _file_system(url)
        self._size = status_of(url)[0]
        self._at = 0
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return has_ranges(self._url)

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if start + offset != self._at:
            self._at = start + offset
            self._open_at()
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        for number in range(_TRIES):
            try:
                if self._file is None:
                    self._open_at()
                content = self._file.read(wanted)
                if content or not wanted:
                    break
                reason = f"it ends after {self._at:,} of {self._size:,} bytes"
            except DataError:
                raise
            except Exception as error:  # drivers raise what they like
                reason = str(error) or type(error).__name__
            self._forget()
            if number == _TRIES - 1:
                raise DataError(
                    without_secrets(f"{self._url}: {reason}. ")
                    + "prepare continues when it is run again."
                )
            time.sleep(_WAIT_SECONDS * 2**number)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def close(self) -> None:
        self._forget()
        super().close()

    def _open_at(self) -> None:
        if self._file is None:
            # Without blocks a web server need not know of ranges.
            size = _BLOCK_BYTES if self.seekable() else 0
            self._file = self._files.open(self._inner, "rb", block_size=size)
            left = 0 if self.seekable() else self._at
            while left and (skipped := self._file.read(min(left, _BLOCK_BYTES))):
                left -= len(skipped)
        if self.seekable():
            self._file.seek(self._at)

    def _forget(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            # What is wrong with it is known already, or does not matter.
            with suppress(Exception):
                file.close()


@contextmanager
def _command(source: str) -> Iterator[Any]:
    # It imports torch, which takes a second.
    from webdataset.gopen import gopen  # noqa: PLC0415

    is_read = False
    pipe = gopen(source)
    try:
        yield pipe
        is_read = not pipe.read(1)
    except OSError as error:
        raise _failed(source, error) from error
    finally:
        try:
            pipe.close()
        except OSError as error:
            # One that is not read to its end is broken off.
            if is_read:
                raise _failed(source, error) from error


def _failed(source: str, error: OSError) -> DataError:
    # The library tells its own arguments as well.
    status = re.search(r"exit (-?\d+)", str(error))
    return DataError(
        f"{source}: the command failed{f', with status {status[1]}' if status else f': {error}'}."
        " What it wrote to stderr stands above."
    )
