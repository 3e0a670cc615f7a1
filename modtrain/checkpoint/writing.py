"""One checkpoint written by all ranks: aside, flushed, then renamed by rank 0."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from modtrain.checkpoint.crew import Crew
from modtrain.checkpoint.layout import MANIFEST, REST, Manifest, aside_of
from modtrain.checkpoint.parts import Part
from modtrain.checkpoint.reading import cause
from modtrain.common.atomic_io import sync
from modtrain.common.errors import CheckpointError

Files = dict[str, dict[str, Any]]


def write(
    path: Path, parts: Callable[[], list[Part]], rest: Any, step: int, crew: Crew, digest: str
) -> None:
    """Write the checkpoint ``path``; collective.

    parts: called once, gives what this rank writes; those of all ranks make up every tensor.
    rest: everything that is not tensors, of which rank 0's is written. digest: of what the tensors
    are, for it must be the same on every rank.

    Raises:
        CheckpointError: on every rank, where one of them could not write its part. Nothing is left
            of it, and what was there before is untouched.
    """
    aside = aside_of(path)
    try:
        crew.first(lambda: _make(path, aside))
        files = _write_parts(aside, parts, crew)
        told = crew.gather((socket.gethostname(), digest, files))
        crew.first(lambda: _commit(path, aside, rest, step, told or [], crew.world_size))
    except (CheckpointException, Exception) as error:
        if crew.is_first:
            shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} could not be written: {cause(error)}. What was saved before is untouched."
            " Make room or mend the disk; the same command goes on from there"
        ) from error


def refuse_to_overwrite(path: Path) -> None:
    """Raise CheckpointError where ``path`` exists."""
    if path.exists():
        raise CheckpointError(f"{path} exists: a checkpoint is never written twice")


def _make(path: Path, aside: Path) -> None:
    refuse_to_overwrite(path)
    shutil.rmtree(aside, ignore_errors=True)
    # Not its parents: a directory that vanished, such as a lost mount, is not to be made anew.
    aside.mkdir()


def _write_parts(aside: Path, parts: Callable[[], list[Part]], crew: Crew) -> Files:
    """Write this rank's tensors; return size and checksum of each file that it wrote."""
    writer = FileSystemWriter(aside)
    writer.fs = files = _HashingFiles()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save_sharded(
            {},
            storage_writer=writer,
            planner=_PartsPlanner(parts),
            process_group=crew.group,
            no_dist=crew.group is None,
        )
    return files.written


def _commit(
    path: Path, aside: Path, rest: Any, step: int, told: list[tuple[str, str, Files]], ranks: int
) -> None:
    """Check that everything is there, add what rank 0 writes, and rename."""
    files: Files = {}
    for rank, (host, digest, own) in enumerate(told):
        if digest != told[0][1]:
            raise CheckpointError(
                f"rank {rank} on {host} would save other tensors than rank 0: start all ranks"
                " with one configuration and one version of the code"
            )
        for name, entry in own.items():
            file = aside / name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                raise CheckpointError(
                    f"{file}, written by rank {rank} on {host}, is not seen by rank 0:"
                    " checkpoints need a file system that all nodes share"
                )
        files |= own
    own_files = _HashingFiles()
    with own_files.create_stream(aside / REST, "wb") as stream:
        torch.save(rest, stream)
    Manifest(step, files | own_files.written, ranks).write(aside)
    for file in (aside / REST, aside / MANIFEST, aside):
        sync(file)
    aside.rename(path)
    sync(path.parent)


class _PartsPlanner(DefaultSavePlanner):
    """Writes what `parts_of` dealt out, where torch's would plan for itself."""

    def __init__(self, parts: Callable[[], list[Part]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._give = parts
        self._parts: dict[MetadataIndex, Part] = {}

    def create_local_plan(self) -> SavePlan:
        # Here, for what fails in a rank's plan torch tells to all.
        self._parts = {part.item.index: part for part in self._give()}
        self.plan = SavePlan([part.item for part in self._parts.values()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._parts[write_item.index].tensor


class _HashingFiles(FileSystem):
    """Files whose checksum is known when they are written: nobody reads them again for it."""

    def __init__(self) -> None:
        self.written: Files = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with Path(path).open(mode) as file:
            stream = _HashingStream(cast(BinaryIO, file))
            try:
                yield stream
            except Exception as error:
                # torch.save hides it behind one of its own.
                raise stream.failure or error from error
        self.written[Path(path).name] = {
            "bytes": stream.size,
            "sha256": stream.digest.hexdigest(),
        }

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Rank 0 has made it. Where it is gone, a new one would hide that."""


class _HashingStream:
    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, content: Any) -> int:
        self.digest.update(content)
        self.size += memoryview(content).nbytes
        try:
            return self.file.write(content)
        except OSError as error:
            self.failure = error
            raise

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        # Torch asks for it to fsync, and does not flush before.
        self.file.flush()
        return self.file.fileno()

    def close(self) -> None:
        self.file.close()
