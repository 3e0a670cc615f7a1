"""Checkpoints on disk: whole or not there at all.

A checkpoint is a directory ``step-<n>``:

- ``.metadata`` and ``*.distcp``: every tensor, by torch.distributed.checkpoint
- ``state.pt``: everything else (numbers, strings, lists), loadable with ``weights_only=True``
- ``manifest.json``: step, and size and SHA-256 of each file; written last

It is written under another name, flushed to disk, and renamed; its path is never written again.
Files of others stay data: nothing is unpickled beyond a list of harmless classes.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from modtrain.errors import CheckpointError
from modtrain.files import file_sha256, sync

log = logging.getLogger(__name__)

FORMAT = 1
_PREFIX, _ASIDE = "step-", ".writing-"
_SAFE_GLOBALS = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
        *("MetadataIndex", "StorageMeta", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}


def checkpoint_path(root: Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` lies under ``root``."""
    return root / f"{_PREFIX}{step:09d}"


def save(path: Path, state: dict[str, Any], step: int) -> None:
    """Write ``state``, a nest of dicts and lists with tensors in it, as the checkpoint ``path``.

    Raises:
        CheckpointError: ``path`` exists already, for checkpoints are never overwritten; or the
            disk does not take it.
    """
    if path.exists():
        raise CheckpointError(f"{path} exists: a checkpoint is never written twice")
    try:
        _write(path, state, step)
    except (CheckpointException, OSError) as error:
        raise CheckpointError(
            f"{path} could not be written: {_cause(error)}. What was saved before is untouched."
            " Make room or mend the disk; the same command goes on from there"
        ) from error


def _write(path: Path, state: dict[str, Any], step: int) -> None:
    aside = path.with_name(_ASIDE + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    rest = _split(state, "", tensors)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save_sharded(dict(tensors), storage_writer=FileSystemWriter(aside), no_dist=True)
    torch.save(rest, aside / "state.pt")
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(aside.iterdir())
    }
    manifest = {"format": FORMAT, "step": step, "files": files}
    (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for file in (*aside.iterdir(), aside):
        sync(file)
    aside.rename(path)
    sync(path.parent)


def load(path: Path) -> dict[str, Any]:
    """Read the checkpoint ``path`` whole, after checking it against its manifest.

    Raises:
        CheckpointError: it is damaged or incomplete, or holds what is not plain data.
    """
    verify(path)
    try:
        rest = torch.load(path / "state.pt", weights_only=True, map_location="cpu")
        reader = _SafeReader(path)
        tensors = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load_sharded(dict(tensors), storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(f"{path} cannot be read: {_cause(error)}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than plain data; not loaded: {error}") from None
    joined: dict[str, Any] = _join(rest, tensors)
    return joined


def verify(path: Path, contents: bool = True) -> int:
    """Check the checkpoint ``path`` against its manifest and return its step.

    contents: also compare checksums, which reads every byte.

    Raises:
        CheckpointError: a file is missing, of another size, or altered.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        step, files = int(manifest["step"]), dict(manifest["files"])
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {error}") from None
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}; this modtrain reads {FORMAT}")
    for name, expected in files.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{path} lacks its file {name}")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{file} is cut short or grown: not {expected['bytes']} bytes")
        if contents and file_sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{file} does not match its checksum")
    return step


def whole_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """List (step, path) of the checkpoints under ``root`` that look whole, oldest first.

    What counts is the manifest inside, not the name. Sizes are compared, contents are not.
    """
    found = []
    for path in root.glob(f"{_PREFIX}*") if root.is_dir() else ():
        try:
            found.append((verify(path, contents=False), path))
        except CheckpointError as error:
            log.warning("passing over a checkpoint: %s", error)
    return sorted(found)


def latest(root: Path) -> tuple[int, Path] | None:
    """Return (step, path) of the newest checkpoint whose every byte is right, None without one."""
    for step, path in reversed(whole_checkpoints(root)):
        try:
            verify(path)
        except CheckpointError as error:
            log.warning("passing over a checkpoint: %s", error)
            continue
        return step, path
    return None


def recover(root: Path) -> tuple[int, Path] | None:
    """Make ``root`` fit to go on from: return what `latest` would, with nothing in the way.

    What an interrupted save or removal left is removed. Damaged checkpoints newer than the one
    returned are kept under the name ``damaged-…``, so that their steps can be saved again.
    """
    for path in root.glob(f"{_ASIDE}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in sorted(root.glob(f"{_PREFIX}*"), reverse=True):
        try:
            return verify(path), path
        except CheckpointError as error:
            kept = path.with_name(f"damaged-{path.name}")
            while kept.exists():
                kept = kept.with_name(kept.name + "-again")
            path.rename(kept)
            log.warning("%s; kept as %s", error, kept.name)
    return None


def prune(root: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove whole checkpoints but the newest ``keep_last`` and multiples of ``keep_every``."""
    for step, path in whole_checkpoints(root)[:-keep_last]:
        if keep_every is None or step % keep_every:
            # Renamed first: a removal cut short must not leave a directory that looks whole.
            doomed = path.with_name(_ASIDE + "removed-" + path.name)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


class _SafeUnpickler(pickle.Unpickler):
    """Builds torch's own metadata classes and dtypes, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _SAFE_GLOBALS:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")


class _SafeReader(FileSystemReader):
    """Torch's reader unpickles its metadata freely; this one does not."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _SafeUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("the metadata is of another type")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _cause(error: BaseException) -> str:
    """What lies behind torch's CheckpointException, which is no Exception and a screen long."""
    if isinstance(error, CheckpointException):
        return "; ".join(str(wrapped[0]) for wrapped in error.failures.values())
    return str(error)


_TENSOR = "__tensor__"


def _split(node: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Copy ``node`` with each tensor moved to ``tensors`` and its key left in its place."""
    if isinstance(node, Tensor):
        if key in tensors:
            raise ValueError(f"two tensors of the state are both named {key}")
        tensors[key] = node.detach()
        return {_TENSOR: key}
    if isinstance(node, dict):
        return {k: _split(v, f"{key}.{k}" if key else str(k), tensors) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_split(v, f"{key}.{i}", tensors) for i, v in enumerate(node))
    return node


def _join(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, dict):
        if set(node) == {_TENSOR}:
            return tensors[node[_TENSOR]]
        return {k: _join(v, tensors) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_join(v, tensors) for v in node)
    return node
