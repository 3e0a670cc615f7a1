"""Files below a URL, by fsspec: in parallel, with time limits, and again where that fails.

A connection is made when it is needed, in each process for itself: nothing of it is pickled or
inherited by a fork. Credentials are the driver's own business.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from modtrain.common.errors import DataError
from modtrain.data.remote.urls import DEFAULT_TIMEOUT, without_secrets

if TYPE_CHECKING:
    from fsspec.asyn import AsyncFileSystem

T = TypeVar("T")
_ATTEMPTS = 7
# Seconds: at most so long between two attempts, each twice as long as the one before.
_FIRST_WAIT = 0.5
_LONGEST_WAIT = 20.0
# Requests at once of a process. Each has few bytes, and waits for the server most of its time.
_PARALLEL = 32
# Of a whole file: at first, at least and at most. They grow while they come within the first of
# these seconds, for the bandwidth, and shrink where they take more than the second, so that they
# come within a request's time from a slow server.
_FIRST_CHUNK, _LEAST_CHUNK, _MOST_CHUNK = 1 << 19, 1 << 16, 1 << 22
_SHORT, _LONG = 1.0, 8.0
CHUNKS_AT_ONCE = 4
# No retry mends these: the file is not there, or not for us.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_FINAL_NAMES = ("NoCredentialsError", "ProfileNotFound", "InvalidURL")
_FINAL_STATUS = (400, 401, 403, 404, 405, 410)
_CHANGED_STATUS = 412
_MISSING_STATUS = 404


class ChangedError(DataError):
    """A file that is not, or is no longer, what the index says."""


@dataclass(frozen=True)
class Range:
    """Bytes ``start`` to one before ``stop`` of the file ``name``.

    version: what `RemoteFiles.versions` gave for the file; where the protocol can compare, another
    version is refused.
    """

    name: str
    start: int
    stop: int
    version: str | None = None


class RemoteFiles:
    """The files below one URL, read in any thread of any process.

    Every method raises DataError that names the URL, once further attempts have failed as well.
    """

    def __init__(self, url: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        """timeout: seconds for one request, after which it is made again."""
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._forget()

    def _forget(self) -> None:
        self._pid = 0
        self._system: Any = None
        self._root = ""
        self._limit: asyncio.Semaphore | None = None
        # By what is under way, the thread that waits for it.
        self._under_way: dict[Future[Any], int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "timeout": self.timeout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def location(self, name: str) -> str:
        """The URL of a file, for a message."""
        return without_secrets(f"{self.url}/{name}")

    def cancel(self, threads: Collection[int]) -> None:
        """Break off what is requested in ``threads``, by identifier: they get CancelledError.

        What they request later is made as before.
        """
        for future, thread in tuple(self._under_way.items()):
            if thread in threads:
                future.cancel()

    def chunks(
        self, name: str, max_bytes: int, num_at_once: Callable[[], int] = lambda: CHUNKS_AT_ONCE
    ) -> Iterator[bytes]:
        """Yield the content of a file of at most ``max_bytes``, whose size is looked at first.

        num_at_once: how many chunks, of 4 MiB at most, are requested together, and are in memory
        then; asked before each time.
        """
        ((size, version),) = self.versions([name])
        if size > max_bytes:
            raise ChangedError(
                f"{self.location(name)}: has {size:,} bytes on the server, more than {max_bytes:,}"
            )
        first, chunk = 0, _FIRST_CHUNK
        while first < size:
            stop = min(size, first + num_at_once() * chunk)
            starts = range(first, stop, chunk)
            parts = [Range(name, at, min(at + chunk, stop), version) for at in starts]
            began = time.monotonic()
            contents = self.read_ranges(parts)
            seconds = time.monotonic() - began
            yield from contents
            first = stop
            if seconds < _SHORT:
                chunk = min(2 * chunk, _MOST_CHUNK)
            elif seconds > _LONG:
                chunk = max(chunk // 2, _LEAST_CHUNK)

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """Return the bytes of each range, all of them requested at once."""
        return self._run(self._gather([self._range(part) for part in ranges]))

    def versions(self, names: Sequence[str]) -> list[tuple[int, str | None]]:
        """Return size and version of each file; the version is None where the server gives none."""
        return self._run(self._gather([self._version(name) for name in names]))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        from fsspec.asyn import get_loop  # noqa: PLC0415

        future = asyncio.run_coroutine_threadsafe(work, get_loop())
        self._under_way[future] = threading.get_ident()
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            del self._under_way[future]

    async def _gather(self, work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            # Requests that nobody waits for would go on.
            for task in tasks:
                task.cancel()
            raise

    async def _version(self, name: str) -> tuple[int, str | None]:
        info = await self._attempts(name, self._info)
        size = info.get("size")
        if type(size) is not int:
            raise DataError(f"{self.location(name)}: the server does not tell its size")
        tag = info.get("ETag") or info.get("etag")
        return size, tag if isinstance(tag, str) else None

    async def _info(self, system: AsyncFileSystem, path: str) -> dict[str, Any]:
        info: dict[str, Any] = await system._info(path)
        return info

    async def _range(self, part: Range) -> bytes:
        async def read(system: AsyncFileSystem, path: str) -> bytes:
            return await _read_range(system, path, part)

        content: bytes = await self._attempts(part.name, read)
        return content

    async def _attempts(self, name: str, work: Any) -> Any:
        """Return ``await work(file system, path)``, tried again after what may pass."""
        from tenacity import (  # noqa: PLC0415
            AsyncRetrying,
            retry_if_exception,
            stop_after_attempt,
            wait_random_exponential,
        )

        system, limit = self._open()
        attempts = AsyncRetrying(
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_random_exponential(_FIRST_WAIT, _LONGEST_WAIT),
            retry=retry_if_exception(_may_pass),
            reraise=True,
        )

        async def once() -> Any:
            async with limit:
                path = f"{self._root}/{name}"
                return await asyncio.wait_for(work(system, path), self.timeout)

        try:
            return await attempts(once)
        except DataError:
            raise
        except asyncio.CancelledError:
            raise
        except Exception as error:
            raise self._failed(name, error) from error

    def _failed(self, name: str, raised: Exception) -> DataError:
        where, error = self.location(name), _reason(raised)
        if _status(error) == _CHANGED_STATUS:
            return ChangedError(
                f"{where}: was changed on the server while it was read. Put the prepared directory"
                " back as it was, or start a run of another name with the new one."
            )
        if isinstance(error, FileNotFoundError):
            return DataError(f"{where}: there is no such file")
        if isinstance(error, TimeoutError):
            return DataError(
                f"{where}: gave no answer in {self.timeout:g} s, {_ATTEMPTS} times."
                " data.fetch_timeout may be raised; the same command continues."
            )
        reason = " ".join(without_secrets(str(error)).split())[:300] or "no reason given"
        return DataError(f"{where}: cannot be read ({type(error).__name__}: {reason})")

    def _open(self) -> tuple[AsyncFileSystem, asyncio.Semaphore]:
        if self._pid != os.getpid() or self._limit is None:
            from fsspec.core import url_to_fs  # noqa: PLC0415
            from fsspec.implementations.asyn_wrapper import (  # noqa: PLC0415
                AsyncFileSystemWrapper,
            )

            # An instance that another thread or a fork made belongs to another event loop.
            system, root = url_to_fs(self.url, skip_instance_cache=True, use_listings_cache=False)
            if not system.async_impl:
                system = AsyncFileSystemWrapper(system, asynchronous=True)
            self._system, self._root = system, root.rstrip("/")
            self._limit = asyncio.Semaphore(_PARALLEL)
            self._pid = os.getpid()
        return self._system, self._limit


async def _read_range(system: AsyncFileSystem, path: str, part: Range) -> bytes:
    """Return the bytes of a range; raise OSError for an answer of another length."""
    options: dict[str, Any] = {}
    protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
    if part.version is not None and protocols & {"http", "https"}:
        options["headers"] = {"If-Match": part.version}
    if part.version is not None and "s3" in protocols:
        content = await _read_s3_range(system, path, part)
    else:
        content = await system._cat_file(path, start=part.start, end=part.stop, **options)
    if len(content) != part.stop - part.start:
        raise OSError(
            f"{len(content):,} bytes came in place of {part.stop - part.start:,}: the connection"
            " broke, or the server has no HTTP ranges"
        )
    return bytes(content)


async def _read_s3_range(system: Any, path: str, part: Range) -> bytes:
    """The same from S3, refused where the object is not the one that was looked at."""
    bucket, key, _ = system.split_path(path)
    answer = await system._call_s3(
        "get_object",
        Bucket=bucket,
        Key=key,
        Range=f"bytes={part.start}-{part.stop - 1}",
        IfMatch=part.version,
        **system.req_kw,
    )
    async with answer["Body"] as body:
        content: bytes = await body.read()
    return content


def _reason(error: BaseException) -> BaseException:
    """What fsspec calls a missing file may be a server that did not answer."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None:
        return error
    return error if _status(cause) == _MISSING_STATUS else cause


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error of aiohttp or botocore stands for."""
    for cause in (error, getattr(error, "__cause__", None)):
        status = getattr(cause, "status", None)
        if isinstance(status, int):
            return status
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(code, int):
                return code
    return None


def _may_pass(error: BaseException) -> bool:
    error = _reason(error)
    if isinstance(error, (asyncio.CancelledError, DataError, *_FINAL)):
        return False
    if not isinstance(error, Exception) or type(error).__name__ in _FINAL_NAMES:
        return False
    return _status(error) not in (*_FINAL_STATUS, _CHANGED_STATUS)
