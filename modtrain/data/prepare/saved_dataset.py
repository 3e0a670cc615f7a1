"""Folders that ``Dataset.save_to_disk`` of Hugging Face wrote, on disk or behind an address."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from modtrain.common.errors import DataError
from modtrain.common.printable import printable
from modtrain.common.reading import MAX_JSON_BYTES, UnreadableError, parse_object, read_json
from modtrain.data.prepare.storage import MissingError, open_source
from modtrain.data.remote.urls import is_url, without_secrets

# What stands beside the Arrow files of a data set, and of one with several splits.
_STATE_NAME = "state.json"
_SPLITS_NAME = "dataset_dict.json"
# Of its splits.
_SHOWN = 20


def saved_dataset(folder: str, source: str) -> list[str]:
    """Return the files of a saved data set, in their order; none of another folder.

    folder: path or address. source: as it is called in messages.
    Raises DataError for one whose files do not make up the data set.
    """
    splits = _content(folder, _SPLITS_NAME, source)
    if splits is not None:
        names = splits.get("splits")
        if not isinstance(names, list):
            raise DataError(f"{source}: {_SPLITS_NAME} does not list its splits")
        folders = printable(", ".join(f"{source.rstrip('/')}/{name}" for name in names[:_SHOWN]))
        raise DataError(f"{source}: is a data set of several splits; name one: {folders}")
    state = _content(folder, _STATE_NAME, source)
    if state is None:
        return []
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(
            f"{source}: its rows are chosen by indices; save it anew:"
            " dataset.flatten_indices().save_to_disk(...)"
        )
    try:
        files = [str(file["filename"]) for file in state["_data_files"]]
    except (KeyError, TypeError):
        raise DataError(f"{source}: {_STATE_NAME} does not list its files") from None
    if any(PurePosixPath(name).name != name for name in files):
        raise DataError(f"{source}: {_STATE_NAME} names files outside of its folder")
    paths = [f"{folder.rstrip('/')}/{name}" for name in files]
    missing = [path for path in paths if not is_url(path) and not Path(path).is_file()]
    if missing:
        name = Path(missing[0]).name
        raise DataError(f"{source}: {_STATE_NAME} names {name}, which is missing")
    return paths


def _content(folder: str, name: str, source: str) -> dict[str, Any] | None:
    """Return what a JSON file of a folder has, None where there is no such file."""
    if is_url(folder):
        return _behind_address(f"{folder.rstrip('/')}/{name}")
    try:
        return read_json(Path(folder, name)) if Path(folder, name).is_file() else None
    except UnreadableError as error:
        raise DataError(f"{source}: {error}") from None


def _behind_address(url: str) -> dict[str, Any] | None:
    try:
        with open_source(url) as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except MissingError:
        return None
    parsed = None if len(content) > MAX_JSON_BYTES else parse_object(content)
    if parsed is None:
        raise DataError(f"{without_secrets(url)}: is not a JSON object")
    return parsed
