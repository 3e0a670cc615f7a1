"""Tensors of a checkpoint read by torch.distributed.checkpoint, without trusting the files.

Torch's reader unpickles its metadata without restrictions, and entries of kind "bytes" too. Here
the metadata may contain a list of harmless classes only, and name tensors in files of the
checkpoint only.
"""

from __future__ import annotations

import enum
import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded

from modtrain.checkpoint.layout import EXTRA_STATE, is_plain_name
from modtrain.checkpoint.plain_data import FileSlice, check_pickle, check_torch_file, load_plain
from modtrain.common.errors import CheckpointError
from modtrain.common.torch_compat import TensorProperties

_SAFE_GLOBALS = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        *("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}
_PATHS_OF_PYTHON_3_13 = "pathlib._local"
_TENSOR_PROPERTIES = ("torch.distributed.checkpoint.metadata", "TensorProperties")


class TensorReader(Mapping[str, Tensor]):
    """The tensors of one checkpoint by key; each is read on access, whole, to the CPU.

    sizes, dtypes: of the tensors, by key; known without reading them.
    """

    def __init__(self, path: Path) -> None:
        """Read the metadata; raise CheckpointError if it is damaged or more than plain data."""
        self.path = path
        self._reader = _SafeReader(path)
        self.sizes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        with translate_load_errors(path):
            for key, entry in self._reader.read_metadata().state_dict_metadata.items():
                if not isinstance(entry, TensorStorageMetadata):
                    raise pickle.UnpicklingError(f"{key} is not a tensor")
                self.sizes[key], self.dtypes[key] = entry.size, entry.properties.dtype
            self._check_sizes()

    def _check_sizes(self) -> None:
        """Raise UnpicklingError for tensors that the files cannot have, before memory is taken."""
        there = sum(file.stat().st_size for file in self.path.glob("*.distcp"))
        named = sum(self.dtypes[key].itemsize * size.numel() for key, size in self.sizes.items())
        if named > there:
            raise pickle.UnpicklingError(
                f"its tensors have {named:,} bytes, and its files {there:,}"
            )

    def into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill ``tensors``, plain tensors or the local parts of DTensors, in place.

        Not collective: every rank reads for itself.

        Raises:
            CheckpointError: one is missing, has another shape, or cannot be read.
        """
        missing = [key for key in tensors if key not in self.sizes]
        if missing:
            raise CheckpointError(f"{self.path} lacks {format_names(missing)}")
        for key, tensor in tensors.items():
            if tensor.shape != self.sizes[key]:
                raise CheckpointError(
                    f"{self.path} has {key} of shape {tuple(self.sizes[key])};"
                    f" this model has {tuple(tensor.shape)}: it is another model"
                )
        with translate_load_errors(self.path), warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load_sharded(
                dict(tensors), storage_reader=self._reader, planner=_TensorPlanner(), no_dist=True
            )

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the whole tensor ``key`` on the CPU, as ``dtype`` or in its saved dtype.

        Raises:
            CheckpointError: there is no such tensor, or it cannot be read.
        """
        if key not in self.sizes:
            raise CheckpointError(f"{self.path} lacks {key}")
        tensor = torch.empty(self.sizes[key], dtype=dtype or self.dtypes[key])
        self.into({key: tensor})
        return tensor

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.sizes:
            raise KeyError(key)
        return self.read(key)

    def __contains__(self, key: object) -> bool:
        return key in self.sizes

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


class RenamedTensors(Mapping[str, Tensor]):
    """Tensors of ``reader`` under other keys; each is read on access. keys: key → the reader's."""

    def __init__(self, reader: TensorReader, keys: Mapping[str, str]) -> None:
        self._reader, self._keys = reader, keys

    def __getitem__(self, key: str) -> Tensor:
        return self._reader[self._keys[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def read_extra_state(path: Path) -> Any:
    """Return everything in the checkpoint ``path`` that is not a tensor.

    Raises:
        CheckpointError: it cannot be read, or contains more than plain data.
    """
    with translate_load_errors(path):
        return load_plain(path / EXTRA_STATE)


@contextmanager
def translate_load_errors(path: Path) -> Iterator[None]:
    """Turn any error of reading ``path`` into a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        # Torch's own text advises to load it all the same.
        reason = "torch refuses it" if "weights_only" in str(error) else error
        raise CheckpointError(
            f"{path} contains more than plain data; not loaded: {reason}"
        ) from None
    except CheckpointException as error:
        raise_interrupt(error)
        raise CheckpointError(f"{path} cannot be read: {describe_failure(error)}") from error
    except Exception as error:
        # Forged or damaged metadata may fail in any way.
        text = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} cannot be read: {text}") from error


def raise_interrupt(error: BaseException) -> None:
    """Raise KeyboardInterrupt if torch has wrapped one, as any error of a rank, in ``error``."""
    if isinstance(error, CheckpointException) and any(
        isinstance(wrapped[0], KeyboardInterrupt) for wrapped in error.failures.values()
    ):
        raise KeyboardInterrupt from error


def describe_failure(error: BaseException) -> str:
    """Return an error's text; of torch's long CheckpointException the causes by rank."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {r}: {wrapped[0]}" for r, wrapped in error.failures.items())
    return str(error)


def format_names(names: list[str], limit: int = 5) -> str:
    """Return ``names`` as text, the first ``limit`` of them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class _SafeUnpickler(pickle.Unpickler):
    """Unpickles torch's own metadata classes and dtypes, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == _PATHS_OF_PYTHON_3_13:
            module = "pathlib"
        if (module, name) == _TENSOR_PROPERTIES:
            return TensorProperties
        if (module, name) in _SAFE_GLOBALS:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")


def _member(kind: Any, name: Any) -> enum.Enum:
    """Return a member of an enumeration; Python 3.11.2, which Debian 12 has, pickles it so."""
    if not (isinstance(kind, enum.EnumType) and name in kind.__members__):
        raise pickle.UnpicklingError("refused to load builtins.getattr")
    return kind.__members__[name]


class _SafeReader(FileSystemReader):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        if self._metadata is not None:
            return self._metadata
        content = (Path(self.path) / ".metadata").read_bytes()
        check_pickle(content)
        metadata = _SafeUnpickler(io.BytesIO(content)).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("the metadata is of another type")
        for info in (metadata.storage_data or {}).values():
            name = info.relative_path
            if not is_plain_name(name) or getattr(info, "transform_descriptors", None):
                raise pickle.UnpicklingError(f"it names {name}, which is outside the checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        self._metadata = metadata
        return metadata

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        # Not by torch's own view of it, which cannot seek from its end.
        check_torch_file(io.BufferedReader(FileSlice(file, sinfo.offset, sinfo.length)))
        part: IO[bytes] = super()._slice_file(file, sinfo)
        return part


class _TensorPlanner(DefaultLoadPlanner):
    """Refuses entries of kind "bytes", which torch's planner unpickles without restrictions."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:  # noqa: ARG002
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is not a tensor")
