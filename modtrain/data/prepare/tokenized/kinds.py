"""Which files hold token numbers, and which files make up a data set of them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from modtrain.common.errors import DataError
from modtrain.common.reading import UnreadableError, read_json
from modtrain.data.remote.urls import is_url, without_secrets

KINDS = ("flat", "megatron", "mds", "litdata")
INDEX_NAME = "index.json"
SUFFIXES = (".bin", ".npy", ".mds", ".mds.zstd", ".mds.zst", ".mds.gz", ".mds.bz2")


def token_kind(path: str) -> str | None:
    """Return which of KINDS a file is, None where its name is none of them.

    Raises DataError for one behind an address, and for an ``.idx`` without what it is the index of.
    """
    name = path.lower()
    if name.endswith(".idx"):
        raise DataError(f"{path}: is the index of a .bin file. Name that one.")
    if not name.endswith(SUFFIXES):
        return None
    if is_url(path):
        raise DataError(
            f"{without_secrets(path)}: token numbers are read from local files. Fetch it first."
        )
    if ".mds" in name:
        return "mds"
    if name.endswith(".bin") and Path(path).with_suffix(".idx").is_file():
        return "megatron"
    index = Path(path).with_name(INDEX_NAME)
    if name.endswith(".bin") and index.is_file() and "chunks" in _index(index):
        return "litdata"
    return "flat"


def index_of(path: str, kind: str) -> Path | None:
    """Return the file that says where the documents of one of token numbers are; None: none does.

    kind: one of KINDS.
    """
    if kind == "flat":
        return None
    return (
        Path(path).with_suffix(".idx") if kind == "megatron" else Path(path).with_name(INDEX_NAME)
    )


def token_folder(folder: Path) -> list[str]:
    """Return the files of an MDS or LitData folder in the order of its index; else nothing."""
    if not (folder / INDEX_NAME).is_file():
        return []
    index = _index(folder / INDEX_NAME)
    try:
        if "shards" in index:
            names = [
                (shard.get("zip_data") or shard["raw_data"])["basename"]
                for shard in index["shards"]
            ]
        else:
            names = [chunk["filename"] for chunk in index.get("chunks", [])]
        outside = [name for name in names if Path(name).name != name]
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{folder}: {INDEX_NAME} does not list its files") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if outside or missing:
        raise DataError(
            f"{folder}: {INDEX_NAME} names {[*outside, *missing][0]}, which is not in it"
        )
    return [str(folder / name) for name in names]


def _index(path: Path) -> dict[str, Any]:
    try:
        return _parsed(path)
    except UnreadableError as error:
        raise DataError(f"{path.parent}: {error}") from None


def _parsed(path: Path) -> dict[str, Any]:
    """Return the content of an index, which many files of a directory ask for."""
    try:
        status = path.stat()
    except OSError:
        # Says what is wrong with it.
        return read_json(path)
    return _read(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _read(path: Path, _mtime_ns: int, _size: int) -> dict[str, Any]:
    return read_json(path)


def entry_of(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the index beside a shard or chunk says: of all of them, and of this one.

    Raises ValueError where it does not name the file.
    """
    file = path.with_name(INDEX_NAME)
    try:
        index, status = _parsed(file), file.stat()
        entry = _entries(file, status.st_mtime_ns, status.st_size).get(path.name)
    except (UnreadableError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its {INDEX_NAME} cannot be used: {error}") from None
    if entry is None:
        raise ValueError(f"its {INDEX_NAME} does not name it")
    return index, entry


@lru_cache(maxsize=4)
def _entries(path: Path, mtime_ns: int, size: int) -> dict[str, dict[str, Any]]:
    """What an index says of each file, by its name: a directory may have 100,000."""
    index, entries = _read(path, mtime_ns, size), {}
    for entry in reversed(index.get("shards") or index["chunks"]):
        files = [entry.get("raw_data"), entry.get("zip_data")]
        for name in [entry.get("filename"), *(file["basename"] for file in files if file)]:
            entries[name] = entry
    return entries
