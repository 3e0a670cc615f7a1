"""Small files of a prepared directory behind a URL, fetched once by a process.

They lie in a directory of this process alone, which goes with it: the next one sees what the server
has then.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path, PurePosixPath

from modtrain.common.atomic_io import file_sha256
from modtrain.common.errors import DataError

_lock = threading.Lock()
_files: dict[tuple[int, str, str], Path] = {}
_folders: list[tempfile.TemporaryDirectory[str]] = []


def fetched(url: str, name: str, max_bytes: int) -> Path:
    """Return where the file ``name`` below ``url`` lies on this machine.

    Raises DataError where it is not there, is larger than ``max_bytes``, or does not come.
    """
    # It imports asyncio, for those who read from a URL.
    from modtrain.data.remote.files import RemoteFiles  # noqa: PLC0415

    # The parent of a fork may end first, and its files with it.
    key = (os.getpid(), url, name)
    with _lock:
        if key not in _files or not _files[key].is_file():
            try:
                folder = tempfile.TemporaryDirectory(prefix="modtrain-")
                path = Path(folder.name, PurePosixPath(name).name)
                with path.open("wb") as file:
                    file.writelines(RemoteFiles(url).chunks(name, max_bytes))
            except OSError as error:
                raise DataError(
                    f"{url}/{name}: cannot be kept in {tempfile.gettempdir()} ({error.strerror})."
                    " Set TMPDIR to a directory with room"
                ) from error
            _folders.append(folder)
            _files[key] = path
        return _files[key]


def fetched_checked(url: str, name: str, max_bytes: int, sha256: str) -> Path:
    """The same for a file whose checksum is known.

    Raises DataError as well where the file has another one.
    """
    path = fetched(url, name, max_bytes)
    if file_sha256(path) != sha256:
        with _lock:
            _files.pop((os.getpid(), url, name), None)
        raise DataError(
            f"{url}/{name}: is not the file that the index was written with. Copy the prepared"
            " directory again"
        )
    return path
